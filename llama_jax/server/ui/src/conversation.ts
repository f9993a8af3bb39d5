/** Conversations as trees of messages: an edit or another answer is a sibling, and one path through the tree is shown. */

export const ROLES = ["user", "assistant", "tool"] as const;

export type Role = (typeof ROLES)[number];

/** Why an answer has ended: at a stop, at the limit of tokens, to have tools called, by the reader, or by an error. */
export const FINISHES = ["stop", "length", "tool_calls", "stopped", "error"] as const;

export type Finish = (typeof FINISHES)[number];

/** A tool that the model wants called, with its arguments in JSON. */
export interface Call {
  id: string;
  name: string;
  arguments: string;
}

export interface Alternative {
  text: string;
  logprob: number;
}

/** A token that was drawn, and the most probable ones in its place. */
export interface Token extends Alternative {
  top: Alternative[];
}

export interface Stats {
  /** Milliseconds from the request to its first text. */
  firstMs: number;
  /** Tokens a second after the first one; absent where the server has not counted them. */
  rate?: number;
  /** Tokens that the answer has, and tokens of the conversation up to its end. */
  written?: number;
  used?: number;
  /** Those of the prompt that were found in the prefix cache. */
  cached?: number;
}

export interface Message {
  id: string;
  /** The message before it, null of the first. */
  parent: string | null;
  role: Role;
  text: string;
  created: number;
  reasoning?: string;
  model?: string;
  finish?: Finish;
  stats?: Stats;
  tokens?: Token[];
  calls?: Call[];
  /** Of a tool's message, the id of the call that it answers. */
  call?: string;
}

export interface Conversation<S = unknown> {
  id: string;
  title: string;
  created: number;
  updated: number;
  settings: S;
  messages: Message[];
  /** Which of several siblings is shown, by their parent ("" of the first message); the newest where none is named. */
  shown: Record<string, string>;
}

export const newId = (): string => crypto.getRandomValues(new Uint32Array(3)).reduce((id, n) => id + n.toString(36), "");

/** Messages with the same parent, oldest first. */
export function siblings(messages: Message[], parent: string | null): Message[] {
  return messages.filter((message) => message.parent === parent);
}

/** The messages that are shown, first to last. */
export function path(conversation: Conversation): Message[] {
  const children = Map.groupBy(conversation.messages, (message) => message.parent);
  const shown: Message[] = [];
  for (let at: string | null = null; ; ) {
    const among: Message[] = children.get(at) ?? [];
    const chosen: string | undefined = conversation.shown[at ?? ""];
    const next: Message | undefined = among.find((message) => message.id === chosen) ?? among.at(-1);
    if (!next) return shown;
    shown.push(next);
    at = next.id;
  }
}

/** The conversation up to a message, first to last. */
export function pathTo(messages: Message[], id: string | null): Message[] {
  const byId = new Map(messages.map((message) => [message.id, message]));
  const found: Message[] = [];
  for (let at = id === null ? undefined : byId.get(id); at; at = at.parent === null ? undefined : byId.get(at.parent))
    found.unshift(at);
  return found;
}

/** With another message, which is shown. */
export function added<C extends Conversation>(conversation: C, message: Message): C {
  return {
    ...conversation,
    messages: [...conversation.messages, message],
    shown: { ...conversation.shown, [message.parent ?? ""]: message.id },
    updated: Date.now(),
  };
}

/** With a message changed. */
export function changed<C extends Conversation>(conversation: C, id: string, change: Partial<Message>): C {
  const messages = conversation.messages.map((message) => (message.id === id ? { ...message, ...change } : message));
  return { ...conversation, messages, updated: Date.now() };
}

/** Without a message and all that follow it. */
export function removed<C extends Conversation>(conversation: C, id: string): C {
  const gone = new Set([id]);
  for (const message of conversation.messages)
    if (message.parent !== null && gone.has(message.parent)) gone.add(message.id);
  const shown = Object.fromEntries(
    Object.entries(conversation.shown).filter(([parent, child]) => !gone.has(parent) && !gone.has(child)),
  );
  return { ...conversation, messages: conversation.messages.filter((message) => !gone.has(message.id)), shown };
}

/** With the sibling shown that is `step` places from a message. */
export function stepped<C extends Conversation>(conversation: C, message: Message, step: number): C {
  const among = siblings(conversation.messages, message.parent);
  const next = among[among.findIndex(({ id }) => id === message.id) + step];
  if (!next) return conversation;
  return { ...conversation, shown: { ...conversation.shown, [message.parent ?? ""]: next.id } };
}

/** A name for a conversation that begins with a text. */
export function titleOf(text: string): string {
  const line = text.trim().split("\n", 1)[0] ?? "";
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line || "Untitled";
}
