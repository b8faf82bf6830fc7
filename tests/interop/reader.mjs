// A page, but for its pixels: StreamDB collections on TanStack DB, each over one stream.
import { DurableStream, stream } from "@durable-streams/client"
import { createStateSchema, createStreamDB } from "@durable-streams/state/db"
import { createLiveQueryCollection, createOptimisticAction, eq } from "@tanstack/db"
import { snapshotFirst } from "../../examples/react_todo/src/snapshot.js"
import { obey } from "./commands.mjs"

const dbs = new Map()
const joins = new Map()
const failures = []

// A session that ends by an error tells nobody but the process.
process.on("unhandledRejection", (error) => failures.push(String(error)))

const anything = { "~standard": { version: 1, vendor: "test", validate: (value) => ({ value }) } }

// Without what the packages add: `$synced` and its like are TanStack DB's, `_seq` is StreamDB's.
function plain(row) {
  return Object.fromEntries(Object.entries(row).filter(([key]) => !key.startsWith("$") && key !== "_seq"))
}

function collection(path) {
  const [name, collection] = path.split(".")
  return dbs.get(name).collections[collection]
}

await obey({
  // `collections` gives each collection's event type and primary key: {messages: ["message", "id"]}.
  async open({ name, url, headers, collections, live = true }) {
    const state = createStateSchema(
      Object.fromEntries(
        Object.entries(collections).map(([key, [type, primaryKey]]) => [key, { schema: anything, type, primaryKey }]),
      ),
    )
    const events = []
    const db = createStreamDB({
      streamOptions: { url, headers, contentType: "application/json" },
      state,
      live,
      onEvent: (event) => events.push(event),
    })
    dbs.set(name, Object.assign(db, { events }))
    await db.preload()
  },

  // A page that joins by a snapshot, as `DurableStreams.snapshot()` gives it, and follows the stream from its offset.
  async join_by_snapshot({ name, snapshot, collections }) {
    const state = createStateSchema(
      Object.fromEntries(
        Object.entries(collections).map(([key, [type, primaryKey]]) => [key, { schema: anything, type, primaryKey }]),
      ),
    )
    const streamOptions = await snapshotFirst(async () => snapshot)
    const db = createStreamDB({ streamOptions, state, live: "long-poll" })
    dbs.set(name, db)
    await db.preload()
  },

  // A page that follows a stream from an offset on, without rows; `source` is the documentation's subclass for it.
  async open_from({ name, url, token, offset, collections, source, live }) {
    const StreamFrom = new Function("DurableStream", `${source}; return StreamFrom`)(DurableStream)
    const state = createStateSchema(
      Object.fromEntries(
        Object.entries(collections).map(([key, [type, primaryKey]]) => [key, { schema: anything, type, primaryKey }]),
      ),
    )
    const asked = []
    const counted = (input, init) => {
      asked.push(new URL(input).searchParams.get("offset"))
      return fetch(input, init)
    }
    const db = createStreamDB({ stream: new StreamFrom({ url, params: { token }, fetch: counted }, offset), state, live })
    dbs.set(name, Object.assign(db, { asked }))
    await db.preload()
  },

  // The offsets that a page of `open_from` has asked for, in order.
  async asked({ name }) {
    return dbs.get(name).asked
  },

  async rows({ collection: path }) {
    return collection(path).toArray.map(plain)
  },

  async events({ name }) {
    return dbs.get(name).events
  },

  async awaitTxId({ name, txid, wait }) {
    await dbs.get(name).utils.awaitTxId(txid, wait)
  },

  // Rows of `from` beside the row of `to` whose `key` is their `by`, as a live query.
  async join({ name, from, to, by, key = "id" }) {
    const query = createLiveQueryCollection((q) =>
      q
        .from({ one: collection(from) })
        .join({ other: collection(to) }, ({ one, other }) => eq(one[by], other[key]), "inner")
        .select(({ one, other }) => ({ one, other })),
    )
    await query.preload()
    joins.set(name, query)
  },

  async joined({ name }) {
    return joins.get(name).toArray.map(({ one, other }) => [plain(one), plain(other)])
  },

  // An optimistic insert: the row shows at once, `request` is made, and the row stands once its txid is seen in every
  // one of `dbs`. Answers what was there before the request ended and after.
  async act({ collection: path, row, request, dbs: names }) {
    const target = collection(path)
    const action = createOptimisticAction({
      onMutate: () => target.insert(row),
      mutationFn: async () => {
        const response = await fetch(request.url, { method: "POST", body: JSON.stringify(row) })
        const { txid } = await response.json()
        await Promise.all(names.map((name) => dbs.get(name).utils.awaitTxId(txid, 10_000)))
      },
    })
    const transaction = action()
    const optimistic = target.toArray.map(plain)
    await transaction.isPersisted.promise
    return { optimistic, confirmed: target.toArray.map(plain) }
  },

  async failures() {
    return failures
  },

  async close({ name }) {
    dbs.get(name).close()
    dbs.delete(name)
  },

  // The plain client: all there is now, from `offset` on.
  async read({ url, headers, offset = "-1" }) {
    const response = await stream({ url, headers, offset, live: false })
    const items = await response.json()
    return { items, offset: response.offset }
  },

  async create({ url, headers }) {
    await DurableStream.create({ url, headers, contentType: "application/json" })
  },
})
