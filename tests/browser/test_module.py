"""`broadcastable.js` against a server that answers by script: what is asked, and what is handed over when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

from broadcastable import static

# Answers are what the script says, in order, and then silence. Each request is noted as its query.
HARNESS = """
const { EventStreamParser, Rows, follow } = await import("/broadcastable.js");

const event = (key, operation = "insert", value = { n: key }) =>
  ({ type: "row", key: String(key), value, headers: { operation, txid: `tx${key}` } });
const data = (...events) => `event: data\\ndata:${JSON.stringify(events)}\\n\\n`;
const control = (offset, more = {}) => {
  const says = { streamNextOffset: offset, streamCursor: "c", upToDate: true, ...more };
  return `event: control\\ndata:${JSON.stringify(says)}\\n\\n`;
};
const encoder = new TextEncoder();

/** An event stream of pieces; then it stays open, ends, or breaks. */
const sse = (pieces, then = "open") => (signal) => new Response(new ReadableStream({
  async start(controller) {
    signal.addEventListener("abort", () => controller.error(signal.reason));
    for (const piece of pieces) {
      controller.enqueue(typeof piece === "string" ? encoder.encode(piece) : piece);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    if (then === "end") controller.close();
    if (then === "break") controller.error(new TypeError("network"));
  },
}), { headers: { "content-type": "text/event-stream" } });
const status = (code, headers = {}) => () => new Response(null, { status: code, headers });
const json = (events, headers) => () => new Response(JSON.stringify(events), { headers });
const unreachable = () => { throw new TypeError("fetch failed"); };

const START = { events: [], offset: "0_0", url: "http://server/stream", token: null };

async function play(answers, options = {}, snapshot = START) {
  const seen = { events: [], offsets: [], states: [], requests: [], snapshots: 0 };
  const queue = [...answers];
  const subscription = follow(snapshot, {
    firstDelay: 5,
    onEvents: (events, offset) => { seen.events.push(...events.map((each) => each.key)); seen.offsets.push(offset); },
    onSnapshot: (events, offset) => { seen.snapshots += 1; seen.offsets.push(`snapshot ${offset}`); },
    onState: ({ state, reason }) => seen.states.push(reason === undefined ? state : `${state}: ${reason}`),
    fetch: async (url, { headers, signal }) => {
      seen.requests.push({ ...Object.fromEntries(url.searchParams), authorization: headers.authorization });
      const answer = queue.shift();
      if (answer) return answer(signal);
      return new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
    },
    ...options,
  });
  const until = async (condition) => {
    const deadline = Date.now() + 10_000;
    while (!condition(seen, subscription)) {
      if (Date.now() > deadline) throw new Error(`waited in vain: ${JSON.stringify(seen)}`);
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  };
  return { seen, subscription, until };
}
const token = (life, mark = "") =>
  ["e30", btoa(JSON.stringify({ iat: 1_000, exp: 1_000 + life, mark })).replaceAll("=", ""), "x"].join(".");
"""


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    """An empty page that can import the module."""

    def serve(route: Route) -> None:
        if route.request.url.endswith(".js"):
            route.fulfill(content_type="text/javascript", body=static.MODULE.read_text("utf-8"))
        else:
            route.fulfill(content_type="text/html", body="<!doctype html><title>empty</title>")

    context = browser.new_context()
    page = context.new_page()
    page.route("http://page.test/**", serve)
    page.goto("http://page.test/")
    yield page
    context.close()


def script(page: Page, body: str) -> Any:
    return page.evaluate(f"async () => {{ {HARNESS} {body} }}")


def test_events_are_handed_over_with_their_offset_or_not_at_all(page: Page) -> None:
    """A response that breaks between the data and the offset after it: the data comes again, and is given once."""
    seen = script(
        page,
        """
        const { seen, until } = await play([
          sse([data(event(1)) + control("0_1"), data(event(2))], "break"),
          sse([data(event(2)), control("0_2")]),
        ]);
        await until(() => seen.events.length === 2);
        return seen;
        """,
    )
    assert seen["events"] == ["1", "2"]
    assert seen["offsets"] == ["snapshot 0_0", "0_1", "0_2"]
    assert [each["offset"] for each in seen["requests"]] == ["0_0", "0_1"]
    assert seen["states"] == ["connecting", "live", "offline: cut off", "live"]


def test_what_arrives_in_one_piece_is_handed_over_in_one(page: Page) -> None:
    """One data event an element, or one for all: a transaction is drawn at once."""
    seen = script(
        page,
        """
        const calls = [];
        const { until } = await play(
          [sse([data(event(1)) + control("0_1") + data(event(2), event(3)) + control("0_2")])],
          { onEvents: (events, offset) => calls.push([events.length, offset]) },
        );
        await until(() => calls.length > 0);
        return calls;
        """,
    )
    assert seen == [[3, "0_2"]]


def test_the_event_stream_is_read_however_it_is_cut(page: Page) -> None:
    """Byte by byte, with every kind of line end, comments, and letters of several bytes."""
    same = script(
        page,
        """
        const text = ": hello\\r\\nevent:data\\rdata: [\\"Grüße 🎈\\",\\ndata:1]\\n\\n"
          + "event: control\\r\\ndata:{}\\r\\n\\r\\n";
        const whole = new EventStreamParser().push(text);
        const results = [];
        for (const size of [1, 2, 3, 7]) {
          const parser = new EventStreamParser();
          const events = [];
          for (let at = 0; at < text.length; at += size) events.push(...parser.push(text.slice(at, at + size)));
          results.push(JSON.stringify(events) === JSON.stringify(whole));
        }
        const bytes = encoder.encode(data(event("Grüße 🎈")) + control("0_1"));
        const { seen, until } = await play([sse([...bytes].map((_, at) => bytes.slice(at, at + 1)).slice(0, 400))],
          { firstDelay: 5 });
        await until(() => seen.events.length === 1);
        return [results, whole, seen.events];
        """,
    )
    assert same[0] == [True] * 4
    assert same[1] == [{"event": "data", "data": '["Grüße 🎈",\n1]'}, {"event": "control", "data": "{}"}]
    assert same[2] == ["Grüße 🎈"]


def test_behind_until_everything_missed_is_here(page: Page) -> None:
    seen = script(
        page,
        """
        const { seen, until } = await play([
          sse([data(event(1)) + control("0_1", { upToDate: false }), data(event(2)) + control("0_2")]),
        ]);
        await until(() => seen.states.at(-1) === "live");
        return seen;
        """,
    )
    assert seen["states"] == ["connecting", "behind", "live"]


def test_a_refused_token_is_refreshed_once_and_read_on_from_the_same_offset(page: Page) -> None:
    seen = script(
        page,
        """
        let asked = 0;
        const { seen, until } = await play(
          [sse([data(event(1)) + control("0_1")], "break"), status(401), sse([data(event(2)) + control("0_2")])],
          { refreshToken: async () => { asked += 1; return "new"; } },
          { offset: "0_0", url: "http://server/stream", token: "old" },
        );
        await until(() => seen.events.length === 2);
        return { ...seen, asked };
        """,
    )
    assert seen["asked"] == 1
    assert [each["authorization"] for each in seen["requests"]] == ["Bearer old", "Bearer old", "Bearer new"]
    assert seen["requests"][-1]["offset"] == "0_1"
    assert seen["events"] == ["1", "2"]


def test_a_token_is_renewed_before_it_expires_and_nothing_is_said(page: Page) -> None:
    seen = script(
        page,
        """
        let asked = 0;
        const { seen, until } = await play(
          [sse([control("0_1")]), sse([data(event(2)) + control("0_2")])],
          { refreshToken: async () => { asked += 1; return token(3_600); } },
          { offset: "0_0", url: "http://server/stream", token: token(1) },
        );
        await until(() => seen.events.length === 1);
        return { ...seen, asked };
        """,
    )
    assert seen["asked"] == 1
    assert seen["states"] == ["connecting", "live"]
    assert seen["requests"][-1]["offset"] == "0_1"


def test_a_token_that_goes_on_being_refused_is_not_asked_for_in_a_hot_loop(page: Page) -> None:
    seen = script(
        page,
        """
        let asked = 0;
        const { seen, subscription } = await play(
          Array.from({ length: 1_000 }, () => status(401)),
          { refreshToken: async () => { asked += 1; return "refused"; }, firstDelay: 100 },
        );
        await new Promise((resolve) => setTimeout(resolve, 700));
        subscription.close();
        return { ...seen, asked };
        """,
    )
    assert 1 < seen["asked"] < 10
    assert "offline: answered 401" in seen["states"]


@pytest.mark.parametrize("given", ['{ detail: "Forbidden" }', '{ token: "" }', "undefined", '""'])
def test_an_answer_without_a_token_is_no_token(page: Page, given: str) -> None:
    """The JSON of an error, most likely: said to be a fault, and no request goes out without the promised token."""
    seen = script(
        page,
        f"""
        let asked = 0;
        const {{ seen, until }} = await play(
          [status(401), status(401), status(401), sse([data(event(1)) + control("0_1")])],
          {{ refreshToken: async () => (asked++ < 2 ? {given} : "new") }},
          {{ offset: "0_0", url: "http://server/stream", token: "old" }},
        );
        await until(() => seen.events.length === 1);
        return seen;
        """,
    )
    assert [each["authorization"] for each in seen["requests"]] == [
        "Bearer old",
        "Bearer old",
        "Bearer old",
        "Bearer new",
    ]
    assert set(seen["states"][1:-1]) == {"offline: no token given"}


@pytest.mark.parametrize("snapshot", ["null", "START"])
def test_a_reader_that_gets_no_snapshot_any_more_is_told_so(page: Page, snapshot: str) -> None:
    """`refreshSnapshot` that gives null ends it, at the start and after the stream was lost."""
    seen = script(
        page,
        f"""
        let asked = 0;
        const {{ seen, until }} = await play(
          [status(404)], {{ refreshSnapshot: async () => {{ asked += 1; return null; }} }}, {snapshot});
        await until(() => seen.states.at(-1).startsWith("gone"));
        await new Promise((resolve) => setTimeout(resolve, 100));
        return [seen.states, asked];
        """,
    )
    assert seen == [["connecting", "gone: forbidden"], 1]


def test_what_is_no_snapshot_is_not_taken_for_one(page: Page) -> None:
    """The JSON of an error again: a fault that is tried again, and at once the caller's where the caller has it."""
    seen = script(
        page,
        """
        const refreshSnapshot = async () => (asked++ === 0 ? { detail: "Forbidden" } : START);
        let asked = 0, refused;
        const { seen, until } = await play([sse([control("0_1")])], { refreshSnapshot }, null);
        await until(() => seen.states.at(-1) === "live");
        try { follow({ detail: "Forbidden" }, { refreshSnapshot }); } catch (error) { refused = error.name; }
        return [seen.states, seen.requests.length, refused];
        """,
    )
    assert seen == [["connecting", "offline: no snapshot given", "behind: no snapshot yet", "live"], 1, "TypeError"]


@pytest.mark.parametrize(
    ("answers", "end"),
    [
        ("[status(404)]", "gone: deleted"),
        ("[status(410)]", "gone: deleted"),
        ("[status(403), status(403)]", "gone: forbidden"),
        ('[sse([control("0_1", { streamClosed: true, upToDate: undefined })])]', "gone: closed"),
        ('[sse([control("-1")])]', "gone: rewound"),
    ],
)
def test_what_is_over_is_said_to_be_over(page: Page, answers: str, end: str) -> None:
    """No further request follows."""
    seen = script(
        page,
        f"""
        const {{ seen, until }} = await play({answers}, {{ refreshToken: async () => "again" }});
        await until(() => seen.states.at(-1).startsWith("gone"));
        const asked = seen.requests.length;
        await new Promise((resolve) => setTimeout(resolve, 100));
        return [seen.states.at(-1), seen.requests.length - asked];
        """,
    )
    assert seen == [end, 0]


MADE_ANEW = """sse([data(event(1)) + control("0000000000000001_0000000000000200")])"""


def test_a_stream_that_was_made_anew_is_noticed_by_its_offsets(page: Page) -> None:
    """Past ours, but of another life of the stream: what is on the page need not be on it."""
    seen = script(
        page,
        f"""
        const start = {{ ...START, offset: "0000000000000000_0000000000000100" }};
        const again = {{ ...START, events: [event(7)], offset: "0000000000000001_0000000000000300" }};
        const {{ seen, until }} = await play(
          [{MADE_ANEW}, sse([data(event(8)) + control("0000000000000001_0000000000000400")])],
          {{ refreshSnapshot: async () => again }}, start);
        await until(() => seen.events.length === 1);
        return [seen.snapshots, seen.events, seen.requests.map((each) => each.offset)];
        """,
    )
    assert seen == [2, ["8"], ["0000000000000000_0000000000000100", "0000000000000001_0000000000000300"]]


def test_a_stream_that_was_made_anew_ends_the_reader_who_has_no_snapshot(page: Page) -> None:
    seen = script(
        page,
        f"""
        const start = {{ ...START, offset: "0000000000000000_0000000000000100" }};
        const {{ seen, until }} = await play([{MADE_ANEW}], {{}}, start);
        await until(() => seen.states.at(-1).startsWith("gone"));
        return [seen.states.at(-1), seen.events];
        """,
    )
    assert seen == ["gone: made anew", []]


@pytest.mark.parametrize("answer", ["status(404)", 'sse([control("-1")])'])
def test_a_lost_stream_is_taken_anew_where_the_application_gives_a_snapshot(page: Page, answer: str) -> None:
    seen = script(
        page,
        f"""
        const {{ seen, until }} = await play(
          [{answer}, sse([data(event(8)) + control("9_2")])],
          {{ refreshSnapshot: async () => ({{ ...START, events: [event(7)], offset: "9_1", token: "t" }}) }},
        );
        await until(() => seen.events.length === 1);
        return seen;
        """,
    )
    assert seen["snapshots"] == 2
    assert seen["offsets"] == ["snapshot 0_0", "snapshot 9_1", "9_2"]
    assert seen["requests"][-1]["offset"] == "9_1"


def test_a_server_that_is_away_is_tried_again_with_growing_pauses(page: Page) -> None:
    seen = script(
        page,
        """
        const pauses = [], states = [];
        const onState = ({ state, retryIn }) => { states.push(state); if (retryIn) pauses.push(retryIn); };
        const { until } = await play(
          [...Array(6).fill(unreachable), status(503, { "retry-after": "1" }), sse([control("0_1")])],
          { firstDelay: 10, longestDelay: 80, onState },
        );
        await until(() => states.at(-1) === "live");
        return pauses;
        """,
    )
    assert len(seen) == 7
    for number, pause in enumerate(seen[:6]):
        most = min(80, 10 * 2**number)
        assert most / 2 <= pause <= most
    assert seen[6] >= 1_000


def test_long_poll_catches_up_first_and_then_waits(page: Page) -> None:
    """204 and the cursor; an answer without news advances nothing."""
    seen = script(
        page,
        """
        const { seen, until } = await play(
          [
            json([event(1)], { "stream-next-offset": "0_1", "stream-cursor": "5" }),
            json([event(2)], { "stream-next-offset": "0_2", "stream-up-to-date": "true", "stream-cursor": "6" }),
            () => new Response(null, { status: 204, headers: { "stream-next-offset": "0_2", "stream-cursor": "7" } }),
            json([event(3)], { "stream-next-offset": "0_3", "stream-up-to-date": "true" }),
          ],
          { live: "long-poll" },
        );
        await until(() => seen.requests.length === 5);
        return seen;
        """,
    )
    assert seen["events"] == ["1", "2", "3"]
    assert [(each["offset"], each.get("live"), each.get("cursor")) for each in seen["requests"]] == [
        ("0_0", None, None),
        ("0_1", None, "5"),
        ("0_2", "long-poll", "6"),
        ("0_2", "long-poll", "7"),
        ("0_3", "long-poll", "7"),
    ]
    assert seen["states"] == ["connecting", "behind", "live"]


def test_an_event_stream_that_says_nothing_gives_way_to_long_poll(page: Page) -> None:
    """A proxy that holds the response back until it is whole."""
    seen = script(
        page,
        """
        const { seen, subscription, until } = await play(
          [sse([]), json([event(1)], { "stream-next-offset": "0_1", "stream-up-to-date": "true" })],
          { patience: 50 },
        );
        await until(() => seen.events.length === 1);
        return [subscription.live, seen.states];
        """,
    )
    assert seen == ["long-poll", ["connecting", "live"]]


def test_a_connection_that_went_silent_is_given_up(page: Page) -> None:
    """A laptop that slept: no error ever comes, and no byte either."""
    seen = script(
        page,
        """
        const { seen, until } = await play(
          [sse([control("0_1")]), sse([data(event(2)) + control("0_2")])], { quietFor: 60 });
        await until(() => seen.events.length === 1);
        return seen;
        """,
    )
    assert seen["states"][:4] == ["connecting", "live", "offline: silent", "live"]
    assert seen["requests"][1]["offset"] == "0_1"


def test_a_fault_in_the_page_does_not_stop_the_reading(page: Page) -> None:
    seen = script(
        page,
        """
        const reported = [];
        const before = globalThis.reportError;
        globalThis.reportError = (error) => reported.push(error.message);
        const keys = [];
        const { until } = await play([sse([data(event(1)) + control("0_1"), data(event(2)) + control("0_2")])], {
          onEvents: ([{ key }]) => { keys.push(key); if (key === "1") throw new Error("drawing failed"); },
        });
        await until(() => keys.length === 2);
        globalThis.reportError = before;
        return [keys, reported];
        """,
    )
    assert seen == [["1", "2"], ["drawing failed"]]


def test_a_transaction_can_be_waited_for(page: Page) -> None:
    """Before it comes, after it came, and in vain."""
    seen = script(
        page,
        """
        const { seen, subscription, until } = await play([sse([control("0_1"), data(event(2)) + control("0_2")])]);
        const early = subscription.sawTxid("tx2");
        const never = subscription.sawTxid("tx3", 30);
        return [await early, await subscription.sawTxid("tx2"), await never];
        """,
    )
    assert seen == [True, True, False]


def test_closed_means_silent(page: Page) -> None:
    seen = script(
        page,
        """
        const { seen, subscription, until } = await play([sse([control("0_1"), data(event(2)) + control("0_2")])]);
        await until(() => seen.states.at(-1) === "live");
        subscription.close();
        await new Promise((resolve) => setTimeout(resolve, 80));
        return [seen.states.at(-1), seen.events, seen.requests.length];
        """,
    )
    assert seen == ["gone: stopped", [], 1]


def test_the_fold_sets_and_removes_whole_rows(page: Page) -> None:
    """In the order in which rows first came; an update of an unknown row is a row, a second delete is nothing."""
    seen = script(
        page,
        """
        const rows = new Rows();
        rows.apply([event(1), event(2), event(1, "update", { n: "one", only: true }), event(3, "delete"),
          event(4, "update"), event(2, "delete"), event(2, "delete"), { typing: "Ada" },
          { type: "$tx", key: "t", headers: { operation: "delete", txid: "t" } }]);
        const first = [...rows.of("row")];
        rows.apply([{ headers: { control: "reset" } }, event(5)]);
        return [first, [...rows.of("row").keys()]];
        """,
    )
    assert seen == [[["1", {"n": "one", "only": True}], ["4", {"n": 4}]], ["5"]]
