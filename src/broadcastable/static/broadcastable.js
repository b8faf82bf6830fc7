/**
 * Follow a broadcastable stream from a page: a snapshot first, then every change after it, in order and once.
 *
 *     import { Rows, follow } from "./broadcastable.js";
 *
 *     async function load(path) {
 *       const response = await fetch(path);
 *       if (response.status === 403) return null; // no longer welcome: following ends
 *       if (!response.ok) throw new Error(`${path}: ${response.status}`); // anything else is tried again
 *       return response.json();
 *     }
 *
 *     const rows = new Rows();
 *     const subscription = follow(null, {
 *       onSnapshot: (events) => { rows.clear(); rows.apply(events); draw(); },
 *       onEvents: (events) => { rows.apply(events); draw(); },
 *       onState: ({ state }) => { badge.textContent = state; },
 *       refreshSnapshot: () => load("/rooms/1/snapshot"),
 *       refreshToken: () => load("/rooms/1/token"),
 *     });
 *
 * The promise: an event is handed over together with the offset after it, or not at all. Whatever happens in between
 * (a server away, an expired token, a laptop asleep), reading goes on from the last offset handed over, so nothing is
 * left out and nothing comes twice.
 *
 * No dependencies. Runs where `fetch` streams: every browser of today, Node 18 and later, Deno, workers.
 */

/**
 * One message of the Durable Streams State Protocol, or any other JSON that was broadcast.
 * @typedef {object} ChangeEvent
 * @property {string} type
 * @property {string} key
 * @property {any} [value] The whole row; missing in a delete.
 * @property {any} [old_value]
 * @property {{operation?: string, control?: string, txid?: string, timestamp?: string}} headers
 */

/**
 * What `broadcastable.snapshot()` returns, as JSON.
 * @typedef {object} Snapshot
 * @property {ChangeEvent[]} [events] The rows as they are, each as an insert.
 * @property {string} [offset] The place in the stream from which the changes after them are read; "-1" reads all.
 * @property {string} url The stream's address, without a token.
 * @property {string | null} [token]
 */

/**
 * - `connecting`: not heard from the server yet.
 * - `live`: everything that the server has is on the page.
 * - `behind`: connected, and reading what was missed.
 * - `offline`: no connection; another attempt follows by itself in `retryIn` milliseconds.
 * - `gone`: over, by `reason`: closed, deleted, forbidden, made anew, rewound, stopped or token expired. No attempt
 *   follows.
 * @typedef {"connecting" | "live" | "behind" | "offline" | "gone"} State
 */

/**
 * @typedef {object} StateChange
 * @property {State} state
 * @property {string} offset Where reading goes on.
 * @property {string} [reason] For people and logs; never holds a token.
 * @property {number} [retryIn] Milliseconds until the next attempt, when offline.
 */

/**
 * @typedef {object} FollowOptions
 * @property {(events: ChangeEvent[], offset: string) => void} [onEvents]
 *   New events, in order. Those of one transaction that came in one piece come in one call.
 * @property {(events: ChangeEvent[], offset: string) => void} [onSnapshot]
 *   A snapshot that replaces everything known: once at the start, and again when the stream had to be taken anew.
 *   `onEvents` gets it when this is missing.
 * @property {(change: StateChange) => void} [onState]
 * @property {() => Promise<string | {token: string, url?: string} | null>} [refreshToken]
 *   Asks your application for a new token. Called before the old one expires and after a 401 or 403. Null says that
 *   this reader is no longer welcome, and is the end: `gone`. A rejected promise is tried again later, and so is an
 *   answer without a token: look at the status before you take an error's JSON for one.
 * @property {() => Promise<Snapshot | null>} [refreshSnapshot]
 *   Asks your application for a new snapshot, when the stream was deleted, made anew, or shortened past our offset.
 *   Null and rejected promises mean the same as above. Without this function a lost stream is the end: `gone`.
 * @property {"sse" | "long-poll"} [live] How to tail. SSE steps back to long-poll by itself where it does not get through.
 * @property {number} [firstDelay] Milliseconds before the first new attempt; doubles each time. Default 250.
 * @property {number} [longestDelay] Most milliseconds between two attempts. Default 15,000.
 * @property {number} [quietFor] Milliseconds without a byte after which a connection counts as dead. Default 90,000.
 * @property {number} [patience] Milliseconds in which an SSE answer must begin, or a proxy is holding it back. Default 8,000.
 * @property {typeof fetch} [fetch]
 */

/** Rows by type and key: the fold of a stream. */
export class Rows {
  /** @type {Map<string, Map<string, any>>} */
  #types = new Map();

  /**
   * Apply events in order. An insert or update sets the whole row, a delete removes it; both may come twice without harm.
   * @param {Iterable<ChangeEvent>} events
   */
  apply(events) {
    for (const { type, key, value, headers } of events) {
      if (headers?.control === "reset") this.clear();
      const operation = headers?.operation;
      if (operation === "delete") this.#types.get(type)?.delete(key);
      else if (operation !== undefined && value !== undefined) this.of(type).set(key, value);
    }
  }

  /**
   * The rows of one type by key, in the order in which they first came.
   * @param {string} type
   * @returns {Map<string, any>}
   */
  of(type) {
    let rows = this.#types.get(type);
    if (rows === undefined) this.#types.set(type, (rows = new Map()));
    return rows;
  }

  clear() {
    this.#types.clear();
  }
}

/**
 * Begin to follow a stream.
 * @param {Snapshot | null} snapshot Null asks `refreshSnapshot` for it, as often as it takes.
 * @param {FollowOptions} [options]
 * @returns {Subscription}
 */
export function follow(snapshot, options = {}) {
  return new Subscription(snapshot, options);
}

/** A stream being followed. Made by `follow`. */
export class Subscription {
  /** @type {FollowOptions} */ #options;
  /** @type {typeof fetch} */ #fetch;
  /** @type {StateChange} */ #last;
  /** Empty until there is a snapshot. */ #url = "";
  /** @type {string | null} */ #token = null;
  /** @type {string} */ #offset;
  /** @type {string | null} */ #cursor = null;
  /** @type {"sse" | "long-poll"} */ #live;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #renewal;
  /** The request that is running. @type {AbortController | null} */ #request = null;
  /** Ends the wait between two attempts. @type {(() => void) | null} */ #wake = null;
  /** One refresh at a time, whoever asks. @type {Promise<boolean> | null} */ #renewing = null;
  /** Faults in a row since the server last told us an offset. */ #failures = 0;
  /** 401 and 403 in a row. */ #refusals = 0;
  /** Snapshots taken anew in a row. */ #losses = 0;
  #over = false;
  /** Transaction ids seen, the latest last. @type {Set<string>} */ #txids = new Set();
  /** @type {Map<string, Set<() => void>>} */ #awaited = new Map();

  /**
   * @param {Snapshot | null} snapshot
   * @param {FollowOptions} options
   */
  constructor(snapshot, options) {
    if (snapshot === null && !options.refreshSnapshot) throw new TypeError("follow(null) needs refreshSnapshot");
    if (snapshot !== null && !isSnapshot(snapshot)) throw new TypeError("follow() needs a snapshot, or null");
    this.#options = options;
    this.#fetch = options.fetch ?? globalThis.fetch.bind(globalThis);
    this.#live = options.live ?? "sse";
    this.#offset = snapshot?.offset ?? "-1";
    this.#last = { state: "connecting", offset: this.#offset };
    globalThis.addEventListener?.("online", this.#hurry);
    globalThis.document?.addEventListener("visibilitychange", this.#hurry);
    // The caller gets the subscription before its first callback.
    queueMicrotask(() => this.#run(snapshot));
  }

  /** The present state. @returns {State} */
  get state() {
    return this.#last.state;
  }

  /** The offset after the last event handed over; keep it to go on from there another time. @returns {string} */
  get offset() {
    return this.#offset;
  }

  /** Which way it is tailing at present. @returns {"sse" | "long-poll"} */
  get live() {
    return this.#live;
  }

  /** Stop for good. No callback follows but the one that says so. */
  close() {
    this.#end("stopped");
  }

  /** Drop the connection, if any, and make another at once. */
  reconnect() {
    this.#request?.abort(RECONNECT);
    this.#wake?.();
  }

  /**
   * Wait for the events of a transaction: for the moment when an optimistic change may give way to the real one.
   * @param {string} txid
   * @param {number} [timeout] Milliseconds.
   * @returns {Promise<boolean>} Whether it came in time. Also true for one of the last 1,000 that came before.
   */
  sawTxid(txid, timeout = 5_000) {
    if (this.#txids.has(txid)) return Promise.resolve(true);
    return new Promise((resolve) => {
      const waiting = this.#awaited.get(txid) ?? new Set();
      this.#awaited.set(txid, waiting);
      const settle = () => {
        clearTimeout(timer);
        resolve(true);
      };
      const timer = setTimeout(() => {
        waiting.delete(settle);
        if (waiting.size === 0) this.#awaited.delete(txid);
        resolve(false);
      }, timeout);
      waiting.add(settle);
    });
  }

  /** @param {Snapshot | null} snapshot */
  async #run(snapshot) {
    if (this.#over) return;
    this.#tell("connecting");
    if (snapshot !== null) this.#begin(snapshot);
    while (!this.#over) {
      const request = (this.#request = new AbortController());
      const since = Date.now();
      const from = this.#offset;
      try {
        if (this.#url === "") throw new Fault("no snapshot yet", { lost: true });
        if (this.#live === "sse") await this.#readEventStream(request);
        else await this.#poll(request);
        // Servers end an SSE answer from time to time; one that ends at once, and empty, is a fault all the same.
        if (this.#live === "sse" && this.#offset === from && Date.now() - since < 1_000) throw new Fault("cut short");
      } catch (error) {
        if (this.#over) return;
        const pause = await this.#recover(error);
        if (pause !== null) await this.#sleep(pause);
      } finally {
        request.abort(RECONNECT);
        if (this.#request === request) this.#request = null;
      }
    }
  }

  /**
   * Decide what an error means.
   * @param {unknown} error
   * @returns {Promise<number | null>} Milliseconds to wait, or null to go on at once.
   */
  async #recover(error) {
    if (error === RECONNECT) return null;
    if (error === HELD_BACK) {
      this.#live = "long-poll";
      return null;
    }
    const failures = this.#failures++;
    let fault = error instanceof Fault ? error : new Fault("an answer that makes no sense");
    // After an outage the way there may be another one.
    if (fault.status === 0) this.#live = this.#options.live ?? "sse";
    try {
      if (fault.status === 401 || fault.status === 403) {
        const fresh = await this.#renewToken();
        if (!fresh) return null;
        // The first refusal is what expiry looks like. More in a row are a disagreement, not an expiry.
        this.#refusals += 1;
        if (fault.status === 403 && this.#refusals > 1) return this.#end("forbidden");
        if (this.#refusals === 1) return null;
      } else if (fault.lost) {
        if (!this.#options.refreshSnapshot) return this.#end(fault.message);
        const snapshot = await this.#options.refreshSnapshot();
        if (this.#over) return null;
        if (snapshot === null) return this.#end("forbidden");
        if (!isSnapshot(snapshot)) throw new Fault("no snapshot given");
        if (this.state !== "connecting") this.#tell("behind", { reason: fault.message });
        this.#begin(snapshot);
        // A stream that is lost again and again must not make a hot loop.
        this.#losses += 1;
        if (this.#losses === 1) return null;
      }
    } catch (error) {
      fault = error instanceof Fault ? error : new Fault("application not reached");
    }
    const most = Math.min(this.#options.longestDelay ?? 15_000, (this.#options.firstDelay ?? 250) * 2 ** failures);
    // Half of it is chance, so that the readers of a server that returns do not all come at the same moment.
    const pause = Math.max(fault.retryAfter, Math.round(most * (0.5 + Math.random() / 2)));
    this.#tell("offline", { reason: fault.message, retryIn: pause });
    return pause;
  }

  /** @param {AbortController} request */
  async #readEventStream(request) {
    const parser = new EventStreamParser();
    const watch = new Watchdog(request, this.#options.patience ?? 8_000, HELD_BACK);
    try {
      const response = await this.#get({ live: "sse" }, request.signal, "text/event-stream");
      if (response.status === 400 || !response.headers.get("content-type")?.startsWith("text/event-stream")) {
        await response.body?.cancel();
        throw HELD_BACK;
      }
      const decoder = new TextDecoder();
      /** Events whose offset has not come yet. @type {ChangeEvent[]} */
      let held = [];
      for await (const chunk of chunks(response.body, request.signal)) {
        watch.restart(this.#options.quietFor ?? 90_000, new Fault("silent"));
        /** @type {ChangeEvent[]} */
        const ready = [];
        let control = null;
        for (const { event, data } of parser.push(decoder.decode(chunk, { stream: true }))) {
          if (event === "data") held.push(...eventsOf(data));
          if (event !== "control") continue;
          control = JSON.parse(data);
          this.#cursor = control.streamCursor ?? this.#cursor;
          this.#refuseAnother(control.streamNextOffset);
          ready.push(...held);
          held = [];
        }
        // Once for each piece that arrived, so that a transaction is drawn at once.
        if (control !== null) this.#deliver(ready, control.streamNextOffset, control);
      }
    } finally {
      watch.stop();
    }
  }

  /** @param {AbortController} request */
  async #poll(request) {
    const watch = new Watchdog(request, this.#options.quietFor ?? 90_000, new Fault("silent"));
    try {
      /** @type {Record<string, string>} */
      const parameters = {};
      // Until everything missed is here, an answer must not wait for news.
      if (this.state === "live") parameters.live = "long-poll";
      if (this.#cursor !== null) parameters.cursor = this.#cursor;
      const response = await this.#get(parameters, request.signal, "application/json");
      if (response.status === 400) throw new Fault("offset refused", { lost: true });
      const text = await response.text();
      const next = response.headers.get("stream-next-offset") ?? this.#offset;
      this.#cursor = response.headers.get("stream-cursor") ?? this.#cursor;
      this.#refuseAnother(next);
      this.#deliver(text === "" ? [] : eventsOf(text), next, {
        upToDate: response.status === 204 || response.headers.has("stream-up-to-date"),
        streamClosed: response.headers.get("stream-closed") === "true",
      });
    } finally {
      watch.stop();
    }
  }

  /**
   * @param {Record<string, string>} parameters
   * @param {AbortSignal} signal
   * @param {string} accept
   * @returns {Promise<Response>} A 200, 204 or 400.
   */
  async #get(parameters, signal, accept) {
    const url = new URL(this.#url, globalThis.location?.href);
    url.searchParams.set("offset", this.#offset);
    for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, value);
    /** @type {Record<string, string>} */
    const headers = { accept };
    // In a header, where it does not end up in the logs of everything on the way.
    if (this.#token) headers.authorization = `Bearer ${this.#token}`;
    let response;
    try {
      response = await this.#fetch(url, { headers, signal, cache: "no-store" });
    } catch {
      throw signal.aborted ? signal.reason : new Fault("not reached");
    }
    if (response.ok || response.status === 400) {
      if (response.ok) this.#refusals = 0;
      return response;
    }
    await response.body?.cancel();
    throw Fault.of(response);
  }

  /**
   * Hand events over, together with the offset after them.
   * @param {ChangeEvent[]} events
   * @param {string} offset
   * @param {{upToDate?: boolean, streamClosed?: boolean}} control
   */
  #deliver(events, offset, control) {
    if (this.#over) return;
    this.#offset = offset;
    this.#failures = this.#losses = 0;
    const atTail = control.upToDate || control.streamClosed;
    if (!atTail) this.#tell("behind");
    if (events.length > 0) this.#call(this.#options.onEvents, events, offset);
    this.#noteTxids(events);
    if (atTail) this.#tell("live");
    if (control.streamClosed) this.#end("closed");
  }

  /** @param {Snapshot} snapshot */
  #begin(snapshot) {
    const events = snapshot.events ?? [];
    this.#url = snapshot.url;
    this.#offset = snapshot.offset ?? "-1";
    this.#cursor = null;
    this.#use(snapshot.token ?? null);
    this.#call(this.#options.onSnapshot ?? this.#options.onEvents, events, this.#offset);
    this.#noteTxids(events);
  }

  /**
   * Offsets of one stream only grow (they sort as text; protocol, offsets). A smaller one is another stream's: the
   * server forgot ours and somebody made it again. A server that remembers it gives the new one higher offsets, and
   * with the usual form of them counts in the first half how often the stream was made. What a new stream with offsets
   * past ours and without that count holds cannot be told from ours.
   * @param {string} next
   */
  #refuseAnother(next) {
    if (typeof next !== "string") throw new Fault("an answer without an offset");
    if (this.#offset !== "now" && next < this.#offset) throw new Fault("rewound", { lost: true });
    const [ours, theirs] = [this.#offset, next].map((offset) => USUAL_OFFSET.exec(offset)?.[1]);
    if (ours !== undefined && theirs !== undefined && ours !== theirs) throw new Fault("made anew", { lost: true });
  }

  /** @param {string | null} token */
  #use(token) {
    this.#token = token;
    clearTimeout(this.#renewal);
    const life = token === null ? null : lifeOf(token);
    if (life === null || !this.#options.refreshToken) return;
    const renew = async () => {
      try {
        if (await this.#renewToken()) this.#request?.abort(RECONNECT);
      } catch {
        // The old one serves until it expires; the 401 then brings us back here, with a pause between the attempts.
        if (!this.#over) this.#renewal = setTimeout(renew, life * 0.05);
      }
    };
    // Longer waits than a timer can count (24 days) need no timer.
    if (life < 2 ** 31) this.#renewal = setTimeout(renew, life * 0.75);
  }

  /** @returns {Promise<boolean>} Whether there is a new token to go on with. */
  #renewToken() {
    this.#renewing ??= this.#askForToken().finally(() => (this.#renewing = null));
    return this.#renewing;
  }

  async #askForToken() {
    if (!this.#options.refreshToken) return this.#end("token expired") !== null;
    const fresh = await this.#options.refreshToken();
    if (this.#over) return false;
    if (fresh === null) return this.#end("forbidden") !== null;
    const { token, url = this.#url } = typeof fresh === "string" ? { token: fresh } : (fresh ?? {});
    // An error's JSON, most likely. Going on without a token would only be refused, again and again.
    if (typeof token !== "string" || token === "") throw new Fault("no token given");
    this.#url = url;
    this.#use(token);
    return true;
  }

  /**
   * @param {State} state
   * @param {{reason?: string, retryIn?: number}} [detail]
   */
  #tell(state, detail = {}) {
    const before = this.#last;
    this.#last = { state, offset: this.#offset, ...detail };
    if (state === before.state && state !== "offline" && state !== "connecting") return;
    this.#call(this.#options.onState, this.#last);
  }

  /**
   * @param {string} reason
   * @returns {null}
   */
  #end(reason) {
    if (this.#over) return null;
    this.#tell("gone", { reason });
    this.#over = true;
    clearTimeout(this.#renewal);
    globalThis.removeEventListener?.("online", this.#hurry);
    globalThis.document?.removeEventListener("visibilitychange", this.#hurry);
    this.#request?.abort(RECONNECT);
    this.#wake?.();
    return null;
  }

  /**
   * A page's mistake in drawing must not stop the reading; it shows up where every uncaught error does.
   * @param {((...values: any[]) => void) | undefined} callback
   * @param {...any} values
   */
  #call(callback, ...values) {
    try {
      callback?.(...values);
    } catch (error) {
      if (globalThis.reportError) globalThis.reportError(error);
      else console.error(error);
    }
  }

  /** @param {ChangeEvent[]} events */
  #noteTxids(events) {
    for (const event of events) {
      const txid = event.headers?.txid;
      if (typeof txid !== "string") continue;
      this.#txids.delete(txid);
      this.#txids.add(txid);
      for (const settle of this.#awaited.get(txid) ?? []) settle();
      this.#awaited.delete(txid);
    }
    for (const txid of this.#txids) {
      if (this.#txids.size <= 1_000) break;
      this.#txids.delete(txid);
    }
  }

  /** The network came back, or somebody looks at the page again: do not sit out a long pause. */
  #hurry = () => {
    if (globalThis.document?.visibilityState !== "hidden") this.#wake?.();
  };

  /** @param {number} milliseconds */
  #sleep(milliseconds) {
    if (this.#over) return Promise.resolve();
    return new Promise((/** @type {(value?: undefined) => void} */ resolve) => {
      const done = () => {
        clearTimeout(timer);
        this.#wake = null;
        resolve();
      };
      const timer = setTimeout(done, milliseconds);
      this.#wake = done;
    });
  }
}

/** Why a request was given up on purpose, though nothing is wrong. */
const RECONNECT = Object.freeze({ name: "reconnect" });
/** Why SSE is given up for long-poll: something on the way holds the answer back, or the server has no SSE. */
const HELD_BACK = Object.freeze({ name: "held back" });

/** The offsets of the embedded server in memory, of the npm reference server and of the module for Caddy. */
const USUAL_OFFSET = /^(\d{16})_\d{16}$/;

/** An answer, or the lack of one, that reading cannot go on from as it is. */
class Fault extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, lost?: boolean, retryAfter?: number}} [detail]
   */
  constructor(message, { status = 0, lost = false, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    /** The offset is of no use any more; only a new snapshot helps. */
    this.lost = lost;
    /** Milliseconds for which the server wishes to be left alone. */
    this.retryAfter = retryAfter;
  }

  /** @param {Response} response */
  static of({ status, headers }) {
    const seconds = Number(headers.get("retry-after"));
    const lost = status === 404 || status === 410;
    const retryAfter = seconds > 0 ? Math.min(seconds, 300) * 1_000 : 0;
    return new Fault(lost ? "deleted" : `answered ${status}`, { status, lost, retryAfter });
  }
}

/** Gives a request up with a reason unless it is restarted in time. */
class Watchdog {
  #request;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer;

  /**
   * @param {AbortController} request
   * @param {number} milliseconds
   * @param {unknown} reason
   */
  constructor(request, milliseconds, reason) {
    this.#request = request;
    this.restart(milliseconds, reason);
  }

  /**
   * @param {number} milliseconds
   * @param {unknown} reason
   */
  restart(milliseconds, reason) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#request.abort(reason), milliseconds);
  }

  stop() {
    clearTimeout(this.#timer);
  }
}

/** Cuts the text of an event stream into its events (HTML Standard, 9.2.6). */
export class EventStreamParser {
  #rest = "";
  #event = "";
  /** @type {string[]} */ #data = [];

  /**
   * @param {string} text The next piece, cut anywhere.
   * @returns {{event: string, data: string}[]} The events that are complete now.
   */
  push(text) {
    const events = [];
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = /** @type {string} */ (lines.pop());
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length > 0) events.push({ event: this.#event || "message", data: this.#data.join("\n") });
        this.#event = "";
        this.#data = [];
        continue;
      }
      const colon = line.indexOf(":");
      if (colon === 0) continue;
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
      if (field === "event") this.#event = value;
      if (field === "data") this.#data.push(value);
    }
    return events;
  }
}

/**
 * The pieces of a body. Chromium cannot iterate one with `for await` in all the versions that are about.
 * @param {ReadableStream<Uint8Array> | null} body
 * @param {AbortSignal} signal
 */
async function* chunks(body, signal) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (body).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    throw signal.aborted ? signal.reason : error instanceof Fault ? error : new Fault("cut off");
  }
}

/**
 * Whether an application gave a snapshot, and not the JSON of an error.
 * @param {Snapshot | null | undefined} given
 */
function isSnapshot(given) {
  return typeof given?.url === "string";
}

/**
 * Servers differ: a data event may hold one message, or an array of any length.
 * @param {string} text
 * @returns {ChangeEvent[]}
 */
function eventsOf(text) {
  const parsed = JSON.parse(text);
  return Array.isArray(parsed) ? parsed : [parsed];
}

/**
 * How long a token lives by its own account, whatever this machine's clock says.
 * @param {string} token
 * @returns {number | null} Milliseconds; null when it does not say, or is no JWT.
 */
function lifeOf(token) {
  try {
    const { iat, exp } = JSON.parse(atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/")));
    return exp > iat ? (exp - iat) * 1_000 : null;
  } catch {
    return null;
  }
}
