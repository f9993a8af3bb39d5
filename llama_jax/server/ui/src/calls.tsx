/** Tools that the model wants called, and what its reader says that they have returned. */

import { useRef } from "preact/hooks";
import { report } from "./answering";
import type { Call, Message } from "./conversation";
import type { Chat } from "./storage";

function pretty(json: string): string {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // not complete yet, or not what was asked for
  }
}

interface Props {
  chat: Chat;
  message: Message;
  calls: Call[];
  /** Whether results are wanted: the answer is complete, and nothing follows it. */
  asks: boolean;
}

export function Calls({ chat, message, calls, asks }: Props) {
  const form = useRef<HTMLFormElement>(null);

  function submit(event: Event): void {
    event.preventDefault();
    const areas = form.current!.querySelectorAll("textarea");
    report(chat, message, Array.from(areas, ({ value }) => value));
  }

  return (
    <form class="calls" ref={form} onSubmit={submit}>
      {calls.map((call, i) => (
        <div class="call" key={i}>
          <span>
            Calls <code>{call.name}</code>
          </span>
          <pre class="mono scrolls" tabIndex={0} role="region" aria-label={`Arguments of ${call.name}`}>
            {pretty(call.arguments)}
          </pre>
          {asks && <textarea class="mono" rows={2} aria-label={`Result of ${call.name}`} placeholder="What it returns" />}
        </div>
      ))}
      {asks && (
        <div class="row">
          <button type="submit" class="primary">
            Send {calls.length > 1 ? "results" : "the result"}
          </button>
          <span class="faint">This page calls no tools itself.</span>
        </div>
      )}
    </form>
  );
}
