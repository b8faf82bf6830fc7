// The npm reference server: in memory, or on files when given a directory.
import { DurableStreamTestServer } from "@durable-streams/server"
import { obey } from "./commands.mjs"

await obey({
  async start({ port = 0, dataDir }) {
    const server = new DurableStreamTestServer({ host: "127.0.0.1", port, ...(dataDir && { dataDir }) })
    return await server.start()
  },
})
