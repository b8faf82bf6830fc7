// The page: which room, what was typed, and where the events of its stream go.
import { follow, Rows } from "/page/broadcastable.js";
import { MessageList } from "/page/messages.js";
import { StreamPanel } from "/page/panel.js";

const $ = (/** @type {string} */ id) => document.getElementById(id);
const NAMES = ["Ada", "Barbara", "Edsger", "Frances", "Grace", "Katherine", "Leslie", "Margaret", "Niklaus", "Radia"];

const app = document.querySelector(".app");
const panel = new StreamPanel();
const list = new MessageList({ edit, move, remove, otherRooms: () => rooms.filter((room) => room.id !== current?.id) });

/** @type {{id: number, name: string, stream: string}[]} */
let rooms = [];
/** @type {{id: number, name: string, stream: string} | null} */
let current = null;
/** @type {import("/page/broadcastable.js").Subscription | null} */
let subscription = null;
let countdown = 0;

// Rooms

async function loadRooms() {
  rooms = await ask("/rooms");
  drawRooms();
}

function drawRooms() {
  $("rooms").replaceChildren(
    ...rooms.map((room, index) => {
      const button = element("button", { type: "button" }, element("span", {}, room.name));
      if (index < 9) button.title = `Alt+${index + 1}`;
      if (room.id === current?.id) button.setAttribute("aria-current", "page");
      button.addEventListener("click", () => enter(room));
      return element("li", {}, button);
    }),
  );
}

/** Leave the room and follow another one's stream. */
function enter(room) {
  current = room;
  history.replaceState(null, "", `#${room.id}`);
  document.title = `${room.name} · broadcastable demo`;
  $("title").textContent = room.name;
  drawRooms();
  $("another").href = `/#${rooms.find((other) => other.id !== room.id)?.id ?? room.id}`;
  subscription?.close();
  list.clear();
  panel.clear();
  panel.name(room.stream);
  const rows = new Rows();
  const mine = follow(null, {
    refreshSnapshot: () => ask(`/rooms/${room.id}/snapshot`),
    refreshToken: async () => ask(`/rooms/${room.id}/token`),
    onSnapshot(events, offset) {
      if (mine !== subscription) return;
      rows.clear();
      rows.apply(events);
      list.show([...rows.of("message").values()]);
      panel.snapshot(events, offset);
    },
    onEvents(events, offset) {
      if (mine !== subscription) return;
      for (const event of events) {
        const before = rows.of(event.type).get(event.key);
        rows.apply([event]);
        if (event.type === "message") list.apply(event.key, before, rows.of("message").get(event.key), event.headers.txid);
      }
      panel.events(events, offset);
    },
    onState(change) {
      if (mine === subscription) showState(change);
    },
  });
  subscription = mine;
  // For whoever looks at the page from the browser's console, or tests it.
  globalThis.subscription = mine;
}

// The connection

const WORDS = {
  connecting: () => "Connecting",
  live: () => "Live",
  behind: () => "Catching up",
  offline: (/** @type {number} */ seconds) => `Offline, next try in ${seconds} s`,
  gone: () => "Ended",
};

/** @param {import("/page/broadcastable.js").StateChange} change */
function showState({ state, reason, retryIn = 0 }) {
  const until = Date.now() + retryIn;
  const draw = () => {
    const seconds = Math.max(0, Math.ceil((until - Date.now()) / 1_000));
    $("badge-text").textContent = state === "gone" ? `Ended: ${reason}` : WORDS[state](seconds);
  };
  clearInterval(countdown);
  $("badge").dataset.state = state;
  $("badge").title = reason ?? "";
  $("retry").hidden = state !== "offline";
  draw();
  if (state === "offline") countdown = setInterval(draw, 250);
  if (state === "offline" || state === "live") void showServer();
}

async function showServer() {
  try {
    const { running } = await ask("/server");
    $("server").textContent = running ? "Stop the server" : "Start the server";
    $("server").dataset.running = String(running);
  } catch {
    // The badge says it already.
  }
}

// What one can do

/** What is sent from here is stored in the order in which it was sent. @type {Promise<unknown>} */
let sending = Promise.resolve();

function send(text) {
  const turn = sending.then(() => post(text));
  sending = turn.catch(() => {});
  return turn;
}

async function post(text) {
  const body = { author: $("author").value.trim() || "Somebody", body: text };
  const { txid, id } = await tell("POST", `/rooms/${current.id}/messages`, body);
  // Shown at once, and replaced by the real one when the stream brings it.
  list.expect(txid, String(id), { ...body, id: String(id), sent_at: new Date().toISOString() });
}

async function edit(id, text) {
  await tell("PATCH", `/messages/${id}`, { body: text });
}

async function move(id, room) {
  await tell("PATCH", `/messages/${id}`, { room_id: room });
}

async function remove(id) {
  await tell("DELETE", `/messages/${id}`);
}

/** A read. */
async function ask(url) {
  const response = await fetch(url, { headers: { accept: "application/json" } });
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? `answered ${response.status}`);
  return response.json();
}

/** A write; says in the page what went wrong. */
async function tell(method, url, body) {
  let why = "The application is not reached.";
  try {
    const response = await fetch(url, { method, headers: { "content-type": "application/json" }, body: JSON.stringify(body ?? {}) });
    const answer = await response.json();
    if (response.ok) {
      $("notice").hidden = true;
      return answer;
    }
    why = answer.error;
  } catch {
    // Told below.
  }
  $("notice").textContent = `Not done. ${why}`;
  $("notice").hidden = false;
  throw new Error(why);
}

/** @returns {HTMLElement} */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Wiring

const text = /** @type {HTMLTextAreaElement} */ ($("text"));

$("composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  const written = text.value.trim();
  if (written === "" || current === null) return;
  text.value = "";
  // What was not stored goes back where it can be sent again.
  await send(written).catch(() => (text.value ||= written));
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
  if (event.key === "ArrowUp" && text.value === "" && list.focusLast()) event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.altKey && /^[1-9]$/.test(event.key) && rooms[Number(event.key) - 1]) {
    event.preventDefault();
    enter(rooms[Number(event.key) - 1]);
  }
  if (event.key === "Escape" && list.has(document.activeElement)) text.focus();
});
$("new-room").addEventListener("submit", async (event) => {
  event.preventDefault();
  const room = await tell("POST", "/rooms", { name: $("room-name").value.trim() });
  $("room-name").value = "";
  await loadRooms();
  enter(rooms.find((each) => each.id === room.id));
});
$("burst").addEventListener("click", () => tell("POST", `/rooms/${current.id}/burst`, { author: $("author").value, count: 50 }));
$("server").addEventListener("click", async () => {
  const running = $("server").dataset.running !== "true";
  await tell("PUT", "/server", { running });
  await showServer();
  if (running) subscription?.reconnect();
});
$("retry").addEventListener("click", () => subscription?.reconnect());
for (const id of ["flip", "back"]) {
  $(id).addEventListener("click", () => {
    const open = app.dataset.view !== "stream";
    app.dataset.view = open ? "stream" : "chat";
    $("flip").setAttribute("aria-expanded", String(open));
    $(open ? "back" : "flip").focus();
  });
}
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  localStorage.theme = document.documentElement.dataset.theme = dark === "dark" ? "light" : "dark";
});
$("author").addEventListener("change", () => (sessionStorage.author = $("author").value));
// A room may have been made in another window meanwhile.
addEventListener("focus", () => loadRooms().catch(() => {}));
addEventListener("hashchange", () => {
  const room = rooms.find((each) => `#${each.id}` === location.hash);
  if (room && room.id !== current?.id) enter(room);
});

if (localStorage.theme) document.documentElement.dataset.theme = localStorage.theme;
$("author").value = sessionStorage.author ??= NAMES[Math.floor(Math.random() * NAMES.length)];
for (;;) {
  try {
    await loadRooms();
    break;
  } catch {
    showState({ state: "offline", reason: "application not reached", retryIn: 1_000, offset: "" });
    await new Promise((resolve) => setTimeout(resolve, 1_000));
  }
}
enter(rooms.find((each) => `#${each.id}` === location.hash) ?? rooms[0]);
text.focus();
