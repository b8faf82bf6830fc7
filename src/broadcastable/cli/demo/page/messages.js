// The messages of a room, one list item each, in the order of their ids.

const time = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const template = document.createElement("template");
template.innerHTML = `
  <li class="message" tabindex="-1">
    <span class="avatar" aria-hidden="true"></span>
    <div><div class="who"><strong></strong><time></time><em hidden>edited</em></div><div class="body"></div></div>
    <button class="icon" type="button" aria-haspopup="menu"><svg aria-hidden="true"><use href="#more"/></svg></button>
  </li>`;

export class MessageList {
  #actions;
  #list = /** @type {HTMLOListElement} */ (document.getElementById("messages"));
  #scroll = /** @type {HTMLElement} */ (document.getElementById("scroll"));
  #menu = /** @type {HTMLElement} */ (document.getElementById("menu"));
  /** @type {Map<string, HTMLElement>} */ #items = new Map();
  /** Messages shown before the stream brought them, by transaction. @type {Map<string, HTMLElement>} */ #expected = new Map();
  /** Transactions that came before the answer to the request that made them. @type {Set<string>} */ #early = new Set();

  constructor(actions) {
    this.#actions = actions;
    this.#list.addEventListener("click", (event) => {
      const button = /** @type {HTMLElement} */ (event.target).closest("button.icon");
      if (button) this.#openMenu(button.closest("li"), button);
    });
    this.#list.addEventListener("keydown", (event) => this.#onKey(event));
    this.#menu.addEventListener("keydown", (event) => this.#onMenuKey(event));
    this.#menu.addEventListener("toggle", (event) => {
      if (/** @type {any} */ (event).newState === "closed") this.#menu.replaceChildren();
    });
  }

  clear() {
    this.show([]);
  }

  /** Replace everything. */
  show(rows) {
    this.#items.clear();
    this.#expected.clear();
    this.#early.clear();
    this.#list.replaceChildren();
    for (const row of rows.toSorted((one, other) => one.id - other.id)) this.#place(String(row.id), this.#draw(row));
    this.#settle();
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }

  /** One row changed. */
  apply(key, before, row, txid) {
    const atEnd = this.#isAtEnd();
    this.#expected.get(txid)?.remove();
    this.#expected.delete(txid);
    this.#early.add(txid);
    if (this.#early.size > 500) this.#early.delete(this.#early.values().next().value);
    const old = this.#items.get(key);
    if (row === undefined) {
      if (old) this.#takeAway(key, old);
    } else if (old) {
      this.#fill(old, row);
      restart(old, "changed");
    } else {
      const item = this.#draw(row);
      this.#place(key, item);
      restart(item, "arrived");
    }
    this.#settle();
    if (atEnd) this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }

  /** Show what was sent until the stream brings it. */
  expect(txid, key, row) {
    if (this.#early.has(txid) || this.#items.has(key)) return;
    const item = this.#draw(row);
    item.classList.add("sending");
    item.querySelector("button").remove();
    this.#expected.set(txid, item);
    this.#list.append(item);
    this.#settle();
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }

  has(node) {
    return this.#list.contains(node);
  }

  /** @returns {boolean} Whether there was one. */
  focusLast() {
    const last = [...this.#items.values()].at(-1) && this.#list.querySelector("li.message:not(.sending, .leaving):last-of-type");
    return this.#focus(/** @type {HTMLElement | null} */ (last ?? this.#list.querySelector("li.message:not(.sending, .leaving)")));
  }

  #focus(item) {
    if (!item) return false;
    for (const other of this.#list.querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", "-1");
    item.tabIndex = 0;
    item.focus();
    return true;
  }

  #isAtEnd() {
    return this.#scroll.scrollHeight - this.#scroll.scrollTop - this.#scroll.clientHeight < 80;
  }

  #settle() {
    document.getElementById("empty").hidden = this.#list.childElementCount > 0;
    if (!this.#list.querySelector('[tabindex="0"]')) this.#list.querySelector("li")?.setAttribute("tabindex", "0");
  }

  #place(key, item) {
    item.dataset.key = key;
    this.#items.set(key, item);
    // Nearly always the last one, so look from the end.
    let before = this.#list.lastElementChild;
    while (before && (before.classList.contains("sending") || Number(before.dataset.key) > Number(key))) before = before.previousElementSibling;
    if (before) before.after(item);
    else this.#list.prepend(item);
  }

  #takeAway(key, item) {
    this.#items.delete(key);
    const focused = item.contains(document.activeElement);
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.classList.add("leaving");
    item.removeAttribute("tabindex");
    item.setAttribute("aria-hidden", "true");
    item.addEventListener("animationend", () => item.remove());
    // A page in the background plays no animation.
    setTimeout(() => item.remove(), 400);
    if (focused && !this.#focus(next)) document.getElementById("text").focus();
  }

  #draw(row) {
    const item = /** @type {HTMLElement} */ (template.content.firstElementChild.cloneNode(true));
    this.#fill(item, row);
    return item;
  }

  #fill(item, row) {
    const sent = new Date(row.sent_at);
    const avatar = item.querySelector(".avatar");
    avatar.textContent = row.author.slice(0, 2);
    avatar.style.setProperty("--hue", String([...row.author].reduce((sum, letter) => sum + letter.codePointAt(0) * 47, 0) % 360));
    item.querySelector("strong").textContent = row.author;
    item.querySelector("time").dateTime = row.sent_at;
    item.querySelector("time").textContent = time.format(sent);
    item.querySelector("em").hidden = !row.edited;
    item.querySelector("button")?.setAttribute("aria-label", `Edit, move or delete the message of ${row.author}: ${row.body.slice(0, 40)}`);
    const body = item.querySelector(".body");
    if (body.querySelector("form")) {
      body.dataset.text = row.body;
    } else {
      body.textContent = row.body;
    }
  }

  // Doing something with one

  #openMenu(item, anchor) {
    const key = item.dataset.key;
    const entry = (label, hint, act, danger = false) => {
      const button = document.createElement("button");
      button.type = "button";
      button.role = "menuitem";
      button.tabIndex = -1;
      button.textContent = label;
      if (danger) button.className = "danger";
      if (hint) button.append(Object.assign(document.createElement("kbd"), { textContent: hint, ariaHidden: "true" }));
      button.addEventListener("click", () => {
        this.#menu.hidePopover();
        act();
      });
      return button;
    };
    this.#menu.replaceChildren(
      entry("Edit", "E", () => this.#edit(item)),
      ...this.#actions.otherRooms().map((room) => entry(`Move to ${room.name}`, "", () => this.#actions.move(key, room.id).catch(() => {}))),
      entry("Delete", "Del", () => this.#actions.remove(key).catch(() => {}), true),
    );
    this.#menu.showPopover();
    const { right, bottom, top } = anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.#menu;
    this.#menu.style.left = `${Math.max(8, right - width)}px`;
    this.#menu.style.top = `${bottom + height + 12 > innerHeight ? Math.max(8, top - height - 4) : bottom + 4}px`;
    this.#menu.querySelector("button").focus();
    this.#menu.dataset.from = key;
  }

  #onMenuKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const entries = [...this.#menu.querySelectorAll("button")];
    if (step) {
      event.preventDefault();
      entries.at((entries.indexOf(document.activeElement) + step) % entries.length).focus();
    }
    if (event.key === "Escape" || event.key === "Tab") {
      event.preventDefault();
      event.stopPropagation();
      this.#menu.hidePopover();
      this.#focus(this.#items.get(this.#menu.dataset.from));
    }
  }

  #onKey(event) {
    const item = /** @type {HTMLElement} */ (event.target);
    if (!item.matches("li") || event.altKey || event.ctrlKey || event.metaKey) return;
    const act = {
      ArrowUp: () => this.#focus(item.previousElementSibling),
      ArrowDown: () => this.#focus(item.nextElementSibling) || document.getElementById("text").focus(),
      Home: () => this.#focus(this.#list.firstElementChild),
      End: () => this.#focus(this.#list.lastElementChild),
      e: () => this.#edit(item),
      m: () => this.#openMenu(item, item.querySelector("button")),
      Enter: () => this.#openMenu(item, item.querySelector("button")),
      Delete: () => this.#actions.remove(item.dataset.key).catch(() => {}),
      Backspace: () => this.#actions.remove(item.dataset.key).catch(() => {}),
    }[event.key];
    if (act === undefined || item.classList.contains("sending")) return;
    event.preventDefault();
    act();
  }

  #edit(item) {
    const body = item.querySelector(".body");
    if (body.querySelector("form")) return;
    body.dataset.text = body.textContent;
    const form = document.createElement("form");
    form.className = "editor";
    form.innerHTML = `<textarea rows="1" maxlength="2000" aria-label="Edit the message" required></textarea><div><button class="quiet small">Save</button><button class="quiet small" type="button">Cancel</button></div>`;
    const text = form.querySelector("textarea");
    text.value = body.dataset.text;
    const done = () => {
      body.textContent = body.dataset.text;
      this.#focus(item);
    };
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const written = text.value.trim();
      if (written === "") return;
      if (written !== body.dataset.text) {
        // The stream brings the new text; until then, and if it is refused, this one stays.
        if (!(await this.#actions.edit(item.dataset.key, written).then(() => true, () => false))) return;
        body.dataset.text = written;
      }
      done();
    });
    form.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") done();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === text) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    form.querySelector('button[type="button"]').addEventListener("click", done);
    body.replaceChildren(form);
    text.focus();
    text.setSelectionRange(text.value.length, text.value.length);
  }
}

/** Play an animation from its beginning, also when it is under way. */
function restart(item, name) {
  item.classList.remove("arrived", "changed");
  void item.offsetWidth;
  item.classList.add(name);
}
