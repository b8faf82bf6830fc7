// Commands from the test: one JSON document a line on standard input, one answer a line on standard output.
// The process ends with its input, so nothing is left behind when a test is killed.
import { createInterface } from "node:readline"

export async function obey(commands) {
  // What the packages print must not be taken for an answer.
  console.log = console.info = console.debug = console.warn = console.error
  const lines = createInterface({ input: process.stdin })
  for await (const line of lines) {
    const { id, command, ...options } = JSON.parse(line)
    // Not awaited here: a command that waits for an event leaves room for the ones that make it come.
    commands[command](options).then(
      (result) => answer({ id, result: result ?? null }),
      (error) => answer({ id, error: `${error.name}: ${error.message}` }),
    )
  }
  process.exit(0)
}

function answer(message) {
  process.stdout.write(JSON.stringify(message) + "\n")
}
