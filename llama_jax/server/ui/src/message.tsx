/** One message: its text, what it cost, and what can be done with it. */

import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { Calls } from "./calls";
import { continuable, continued, edit, regenerate } from "./answering";
import { type Message, siblings, stepped } from "./conversation";
import { IconButton } from "./icons";
import { show } from "./markdown";
import { type Live, spoken, update } from "./state";
import type { Chat } from "./storage";
import { Tokens } from "./tokens";

/** A text area as high as its text. */
export function grow(area: HTMLTextAreaElement | null): void {
  if (!area) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

export async function copy(text: string): Promise<void> {
  // Over plain HTTP, but for this machine, there is no clipboard to write to.
  const copied = navigator.clipboard ? navigator.clipboard.writeText(text).then(() => true, () => false) : copiedAsSelected(text);
  spoken.value = (await copied) ? "Copied" : "The browser does not permit copying here";
}

function copiedAsSelected(text: string): boolean {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "hidden";
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
}

function Markdown({ text }: { text: string }) {
  const element = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => show(element.current!, text), [text]);

  async function copyCode(event: MouseEvent): Promise<void> {
    const button = (event.target as Element).closest<HTMLElement>("[data-copy]");
    if (!button) return;
    await copy(button.closest(".code")?.querySelector("code")?.textContent ?? "");
    button.textContent = spoken.value === "Copied" ? "Copied" : "Failed";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  return <div class="markdown" ref={element} onClick={copyCode} />;
}

function Editor({ chat, message, close }: { chat: Chat; message: Message; close: () => void }) {
  const area = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => {
    grow(area.current);
    area.current?.focus();
    area.current?.setSelectionRange(message.text.length, message.text.length);
  }, []);

  function save(): void {
    const text = area.current!.value;
    close();
    if (text.trim() && text !== message.text) edit(chat, message, text);
  }

  function pressed(event: KeyboardEvent): void {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
  }

  return (
    <form class="editor" onSubmit={(event) => (event.preventDefault(), save())} onKeyDown={pressed}>
      <textarea ref={area} aria-label="Text of the message" onInput={() => grow(area.current)} defaultValue={message.text} />
      <div class="row">
        <button type="submit" class="primary">
          {message.role === "user" ? "Send" : "Save"}
        </button>
        <button type="button" onClick={close}>
          Cancel
        </button>
        <span class="faint">The message that was there stays as a branch.</span>
      </div>
    </form>
  );
}

function Facts({ message }: { message: Message }) {
  const { stats, finish } = message;
  const parts = [
    stats?.rate && `${stats.rate.toFixed(1)} tokens/s`,
    stats && `first after ${seconds(stats.firstMs)}`,
    stats?.written && `${stats.written.toLocaleString("en")} tokens`,
    finish === "length" && "cut at the limit of tokens",
    finish === "stopped" && "stopped",
    finish === "error" && "broken off",
  ];
  return <span class="facts faint">{parts.filter(Boolean).join(" · ")}</span>;
}

const seconds = (ms: number): string => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`);

const SPEAKERS = { user: "You", assistant: "Assistant", tool: "Tool" };

interface Props {
  chat: Chat;
  message: Message;
  live: Live | undefined;
  /** Whether another message of the conversation is being written, so that nothing may change. */
  busy: boolean;
  last: boolean;
}

export function MessageView({ chat, message, live, busy, last }: Props) {
  const [editing, setEditing] = useState(false);
  const [probabilities, setProbabilities] = useState(false);
  const said = message.role !== "assistant";
  const calls = live?.calls ?? message.calls ?? [];
  const text = live?.text ?? message.text;
  const reasoning = live?.reasoning ?? message.reasoning;
  const tokens = live?.tokens ?? message.tokens;
  const writing = live !== undefined;

  return (
    <article class={`message ${message.role}`} aria-label={SPEAKERS[message.role]} aria-busy={writing}>
      {reasoning && (
        <details class="reasoning" open={writing && !text}>
          <summary>Reasoning</summary>
          <Markdown text={reasoning} />
        </details>
      )}
      {editing ? (
        <Editor chat={chat} message={message} close={() => setEditing(false)} />
      ) : said ? (
        <div class="said">{text}</div>
      ) : probabilities && tokens ? (
        <Tokens tokens={tokens} />
      ) : (
        <Markdown text={text} />
      )}
      {calls.length > 0 && <Calls chat={chat} message={message} calls={calls} asks={last && !busy} />}
      {writing && !text && !reasoning && !calls.length && <div class="waiting" role="img" aria-label="Waiting for the first token" />}
      {!writing && !editing && (
        <div class="row actions">
          <Branches chat={chat} message={message} busy={busy} />
          <IconButton icon="copy" label="Copy" onClick={() => void copy(text)} />
          {message.role !== "tool" && <IconButton icon="edit" label="Edit" disabled={busy} onClick={() => setEditing(true)} />}
          {!said && <IconButton icon="again" label="Regenerate" disabled={busy} onClick={() => regenerate(chat, message)} />}
          {!said && last && continuable(chat, message) && (
            <IconButton icon="more" label="Continue" disabled={busy} onClick={() => void continued(chat.id, message)} />
          )}
          {!said && tokens && (
            <IconButton
              icon="bars"
              label="Token probabilities"
              pressed={probabilities}
              onClick={() => setProbabilities(!probabilities)}
            />
          )}
          {!said && <Facts message={message} />}
        </div>
      )}
    </article>
  );
}

function Branches({ chat, message, busy }: { chat: Chat; message: Message; busy: boolean }) {
  const among = siblings(chat.messages, message.parent);
  if (among.length < 2) return null;
  const at = among.findIndex(({ id }) => id === message.id);
  const step = (by: number) => update(chat.id, (chat) => stepped(chat, message, by));
  return (
    <span class="branches" role="group" aria-label="Branches">
      <IconButton icon="left" label="Previous branch" disabled={busy || at === 0} onClick={() => step(-1)} />
      <span aria-label={`Branch ${at + 1} of ${among.length}`}>
        {at + 1}/{among.length}
      </span>
      <IconButton icon="right" label="Next branch" disabled={busy || at === among.length - 1} onClick={() => step(1)} />
    </span>
  );
}
