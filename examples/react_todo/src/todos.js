import { createStateSchema, createStreamDB } from "@durable-streams/state/db";
import { createOptimisticAction } from "@tanstack/react-db";
import { snapshotFirst } from "./snapshot.js";

/** What the server says is a todo: it has checked it already. */
const todo = { "~standard": { version: 1, vendor: "todos", validate: (value) => ({ value }) } };

const db = createStreamDB({
  streamOptions: await snapshotFirst(() => ask("GET", "/api/snapshot")),
  state: createStateSchema({ todos: { schema: todo, type: "todo", primaryKey: "id" } }),
});
await db.preload();

export const todos = db.collections.todos;

async function ask(method, path, body) {
  const response = await fetch(path, {
    method,
    headers: body && { "Content-Type": "application/json" },
    body: body && JSON.stringify(body),
  });
  if (!response.ok) throw new Error(`${method} ${path}: ${response.status}`);
  return response.json();
}

/**
 * Changes `todos` at once, then asks the server, then waits until the change is on the stream. Only then does the real
 * row take the place of the optimistic one, so it neither flickers nor comes twice. If the server refuses, it goes.
 */
function action(change, method, path, body = () => undefined) {
  return createOptimisticAction({
    onMutate: change,
    mutationFn: async (given) => {
      const { txid } = await ask(method, path(given), body(given));
      await db.utils.awaitTxId(txid);
    },
  });
}

// The page chooses the key, so that the row it shows and the row it gets are the same one.
const adding = action(
  (row) => todos.insert(row),
  "POST",
  () => "/api/todos",
  ({ id, text }) => ({ id, text }),
);
export const add = (text) => adding({ id: crypto.randomUUID(), text, done: false, at: new Date().toISOString() });

export const tick = action(
  ({ id, done }) => todos.update(id, (draft) => { draft.done = done; }),
  "PATCH",
  ({ id }) => `/api/todos/${id}`,
  ({ done }) => ({ done }),
);

export const remove = action(
  ({ id }) => todos.delete(id),
  "DELETE",
  ({ id }) => `/api/todos/${id}`,
);

export const clearDone = action(
  () => {
    const done = todos.toArray.filter((row) => row.done).map((row) => row.id);
    if (done.length) todos.delete(done);
  },
  "POST",
  () => "/api/todos/clear",
);
