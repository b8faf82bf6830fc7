/**
 * A `fetch` for the Durable Streams client that begins with a snapshot.
 *
 * The client asks for the stream from its beginning. This answers that one request with the snapshot's rows, and with the
 * offset after which every change of them follows; from there the client goes on by itself, on the real stream.
 *
 * A token that has run out is renewed here too, once for all requests that find out at the same time: the client would
 * end the session at the first 401.
 *
 * @param {() => Promise<{offset: string, url: string, token: string, events: object[]}>} load Asks the application.
 */
export async function snapshotFirst(load) {
  const first = await load();
  let token = first.token;
  let renewal = null;

  async function renew(old) {
    if (token !== old) return; // somebody has done it meanwhile
    renewal ??= load().then((fresh) => { token = fresh.token; }).finally(() => { renewal = null; });
    await renewal;
  }

  async function fetchFrom(input, init = {}) {
    const url = new URL(input instanceof Request ? input.url : input);
    if (url.searchParams.get("offset") === "-1") {
      const headers = { "Content-Type": "application/json", "Stream-Next-Offset": first.offset };
      return new Response(JSON.stringify(first.events), { headers });
    }
    const used = token;
    const ask = (bearer) => {
      const headers = new Headers(init.headers);
      headers.set("Authorization", `Bearer ${bearer}`);
      return fetch(url, { ...init, headers });
    };
    const response = await ask(used);
    if (response.status !== 401) return response;
    await renew(used);
    return ask(token);
  }

  return { url: first.url, contentType: "application/json", fetch: fetchFrom };
}
