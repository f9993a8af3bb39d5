/** The list of conversations. */

import { signal } from "@preact/signals";
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { Icon, IconButton } from "./icons";
import { add, chats, currentId, dialog, drawer, fail, lives, NONE, open, remove, spoken, update } from "./state";
import type { Chat } from "./storage";
import { exported, imported } from "./transfer";

const query = signal("");

function found(chat: Chat): boolean {
  const wanted = query.value.trim().toLowerCase();
  if (!wanted) return true;
  return [chat.title, ...chat.messages.map(({ text }) => text)].some((text) => text.toLowerCase().includes(wanted));
}

export function download(name: string, some: Chat[]): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([exported(some)], { type: "application/json" }));
  link.download = `${name.replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "conversation"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function upload(input: HTMLInputElement): Promise<void> {
  const [file] = input.files ?? [];
  input.value = "";
  if (!file) return;
  try {
    const more = imported(await file.text());
    add(...more);
    spoken.value = `${more.length} imported`;
  } catch (error) {
    fail(currentId.value ?? NONE, error);
  }
}

export function Sidebar() {
  const input = useRef<HTMLInputElement>(null);
  const listed = chats.value.filter(found).sort((a, b) => b.updated - a.updated);
  return (
    <nav class={`sidebar ${drawer.value ? "open" : ""}`} aria-label="Conversations">
      <div class="row head">
        <span class="brand">llama_jax</span>
        <IconButton icon="close" label="Close the list" class="phone" onClick={() => (drawer.value = false)} />
      </div>
      <button type="button" class="new" onClick={() => open(null)}>
        <Icon name="plus" /> New conversation
      </button>
      <label class="search">
        <Icon name="search" />
        <input
          id="search"
          type="search"
          placeholder="Search"
          aria-label="Search conversations"
          value={query}
          onInput={(event) => (query.value = event.currentTarget.value)}
        />
      </label>
      <ul class="list">
        {listed.map((chat) => (
          <Entry key={chat.id} chat={chat} />
        ))}
        {!listed.length && <li class="faint none">{query.value ? "Nothing found" : "No conversations yet"}</li>}
      </ul>
      <div class="row foot">
        <IconButton icon="upload" label="Import conversations" onClick={() => input.current?.click()} />
        <input
          ref={input}
          type="file"
          accept="application/json,.json"
          hidden
          aria-label="File of conversations"
          onChange={(event) => void upload(event.currentTarget)}
        />
        <IconButton
          icon="download"
          label="Export all conversations"
          disabled={!chats.value.length}
          onClick={() => download("llama_jax conversations", chats.value)}
        />
        <span class="space" />
        <IconButton icon="keyboard" label="Keyboard shortcuts" onClick={() => (dialog.value = "shortcuts")} />
      </div>
    </nav>
  );
}

function Entry({ chat }: { chat: Chat }) {
  const [doing, setDoing] = useState<"rename" | "delete" | null>(null);
  const focused = useRef<HTMLElement>(null);
  useLayoutEffect(() => focused.current?.focus(), [doing]);
  const open_ = chat.id === currentId.value;
  const cancel = (event: KeyboardEvent) => event.key === "Escape" && (event.stopPropagation(), setDoing(null));

  if (doing === "rename")
    return (
      <li class="entry">
        <input
          ref={(input) => void (focused.current = input)}
          aria-label="Name of the conversation"
          maxLength={200}
          defaultValue={chat.title}
          onKeyDown={(event) => {
            if (event.key === "Escape") event.currentTarget.value = chat.title; // losing the focus keeps what is there
            if (event.key === "Enter") event.currentTarget.blur();
            else cancel(event);
          }}
          onBlur={(event) => {
            const title = event.currentTarget.value.trim();
            if (title && title !== chat.title) update(chat.id, (chat) => ({ ...chat, title }));
            setDoing(null);
          }}
        />
      </li>
    );
  if (doing === "delete")
    return (
      <li class="entry asks" onKeyDown={cancel}>
        <span>Delete for good?</span>
        <button type="button" ref={(button) => void (focused.current = button)} class="danger" onClick={() => remove(chat.id)}>
          Delete
        </button>
        <button type="button" onClick={() => setDoing(null)}>
          Keep
        </button>
      </li>
    );
  return (
    <li class={`entry ${open_ ? "current" : ""}`}>
      <button type="button" class="title" aria-current={open_ ? "page" : undefined} title={chat.title} onClick={() => open(chat.id)}>
        {chat.title}
        {lives.value[chat.id] && <span class="dot" role="img" aria-label="being answered" />}
      </button>
      <IconButton icon="edit" label={`Rename ${chat.title}`} onClick={() => setDoing("rename")} />
      <IconButton icon="download" label={`Export ${chat.title}`} onClick={() => download(chat.title, [chat])} />
      <IconButton icon="trash" label={`Delete ${chat.title}`} onClick={() => setDoing("delete")} />
    </li>
  );
}
