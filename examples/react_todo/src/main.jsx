import { eq, useLiveQuery } from "@tanstack/react-db";
import { StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { add, clearDone, remove, tick, todos } from "./todos.js";

function Todos() {
  const [text, setText] = useState("");
  const [fault, setFault] = useState(null);
  const { data: rows } = useLiveQuery((query) => query.from({ todo: todos }).orderBy(({ todo }) => todo.at));
  const { data: open } = useLiveQuery((query) => query.from({ todo: todos }).where(({ todo }) => eq(todo.done, false)));

  /** The change shows at once; what the server does not take is taken back, and said. */
  function change(made) {
    setFault(null);
    made.isPersisted.promise.catch((error) => setFault(error.message));
  }

  function submit(event) {
    event.preventDefault();
    change(add(text));
    setText("");
  }

  return (
    <>
      <h1>Todos</h1>
      <form onSubmit={submit}>
        <input aria-label="What is to be done" value={text} onChange={(event) => setText(event.target.value)} required />
        <button>Add</button>
      </form>
      {fault && <p role="alert">{fault}</p>}
      <ul>
        {rows.map((row) => (
          <li key={row.id} className={row.done ? "done" : undefined}>
            <input
              id={row.id}
              type="checkbox"
              checked={row.done}
              onChange={(event) => change(tick({ id: row.id, done: event.target.checked }))}
            />
            <label htmlFor={row.id}>{row.text}</label>
            <button aria-label={`Delete ${row.text}`} onClick={() => change(remove({ id: row.id }))}>
              ×
            </button>
          </li>
        ))}
      </ul>
      <p>
        <span data-open>{open.length} open</span>{" "}
        <button disabled={open.length === rows.length} onClick={() => change(clearDone())}>
          Clear what is done
        </button>
      </p>
    </>
  );
}

createRoot(document.getElementById("root")).render(
  <StrictMode>
    <Todos />
  </StrictMode>,
);
