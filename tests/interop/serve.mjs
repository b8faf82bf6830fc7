// The npm reference server as a command: node serve.mjs PORT DIRECTORY, until killed.
import { DurableStreamTestServer } from "@durable-streams/server"

const [port, dataDir] = process.argv.slice(2)
await new DurableStreamTestServer({ host: "127.0.0.1", port: Number(port), dataDir }).start()
