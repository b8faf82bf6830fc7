// The change events as they came, and the offset after them.

const MOST = 200;

export class StreamPanel {
  #list = document.getElementById("events");
  #offset = document.getElementById("offset");
  #latency = document.getElementById("latency");
  /** Milliseconds from commit to here, the latest last. @type {number[]} */ #took = [];

  clear() {
    this.#list.replaceChildren();
    this.#took = [];
    this.#latency.textContent = "waiting for a change";
  }

  /** @param {any[]} events @param {string} offset */
  snapshot(events, offset) {
    this.#list.replaceChildren();
    this.#move(offset);
    const note = document.createElement("li");
    note.className = "note";
    note.innerHTML = "<details><summary><b data-operation='snapshot'>snapshot</b><span class='name'></span><small></small><small class='at'></small></summary><pre></pre></details>";
    note.querySelector(".name").textContent = `${events.length} rows`;
    note.querySelector(".at").textContent = `then from ${offset}`;
    note.querySelector("pre").textContent = events.map((event) => JSON.stringify(event)).join("\n");
    this.#list.prepend(note);
  }

  /** @param {string} name */
  name(name) {
    document.getElementById("stream-name").textContent = name;
  }

  /** @param {any[]} events @param {string} offset */
  events(events, offset) {
    const now = Date.now();
    const items = events.map((event) => this.#item(event, offset, now));
    this.#list.prepend(...items.reverse());
    while (this.#list.childElementCount > MOST) this.#list.lastElementChild.remove();
    this.#move(offset);
    if (this.#took.length > 0) {
      const sorted = this.#took.toSorted((one, other) => one - other);
      this.#latency.textContent = `${this.#took.at(-1)} ms, median ${sorted[sorted.length >> 1]} ms of ${sorted.length}`;
    }
  }

  #item(event, offset, now) {
    const item = document.createElement("li");
    item.className = "new";
    item.innerHTML = "<details><summary><b></b><span class='name'></span><small></small><small class='at'></small></summary><pre></pre></details>";
    const operation = event.headers?.operation ?? "event";
    item.querySelector("b").textContent = operation;
    item.querySelector("b").dataset.operation = operation;
    item.querySelector(".name").textContent = `${event.type}/${event.key}${event.value?.body ? ` ${event.value.body}` : ""}`;
    item.querySelector(".at").textContent = offset;
    item.querySelector("pre").textContent = JSON.stringify(event, null, 2);
    const took = now - Date.parse(event.headers?.timestamp);
    // The clocks are the same machine's in a demo; what comes after an outage says nothing about speed.
    if (took >= 0 && took < 2_000) {
      item.querySelector("small").textContent = `${took} ms`;
      this.#took.push(took);
      if (this.#took.length > 500) this.#took.shift();
    }
    return item;
  }

  #move(offset) {
    this.#offset.textContent = offset;
    this.#offset.classList.remove("moved");
    void this.#offset.offsetWidth;
    this.#offset.classList.add("moved");
  }
}
