/** Conversations as a file, and back. A file may come from anywhere, so every part of it is checked. */

import { type Call, FINISHES, type Message, newId, ROLES, type Stats, titleOf, type Token } from "./conversation";
import { settingsOf } from "./settings";
import type { Chat } from "./storage";

const FORMAT = "llama_jax conversations";
const VERSION = 1;

export function exported(chats: Chat[]): string {
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations: chats }, null, 1);
}

/** Conversations of an exported file, or the one of a list of messages, under ids of their own.
 *  @throws Error: what is wrong with it. */
export function imported(text: string): Chat[] {
  let file: Record<string, unknown>;
  try {
    const value: unknown = JSON.parse(text);
    if (Array.isArray(value)) return [chatOf(linear(value), 0)];
    file = object(value, "the file");
  } catch (error) {
    throw new Error(error instanceof SyntaxError ? "This file is no JSON." : (error as Error).message);
  }
  if (file.format !== FORMAT) throw new Error("This file was not exported by this page.");
  if (file.version !== VERSION) throw new Error(`This file has version ${String(file.version)}; known is ${VERSION}.`);
  return list(file.conversations, "conversations").map(chatOf);
}

/** A list of messages, as OpenAI's API and the chat in the terminal have it, in the shape of an exported conversation. */
function linear(items: unknown[]): object {
  const said = items.map((item, i) => object(item, `message ${i}`));
  const system = said[0]?.role === "system" ? said.shift()!.content : "";
  const messages = said.map(({ role, content, tool_calls, tool_call_id: call }, i) => ({
    id: `${i}`,
    parent: i ? `${i - 1}` : null,
    role,
    text: content ?? "",
    call,
    calls: tool_calls && list(tool_calls, `"tool_calls" of message ${i}`).map(called),
  }));
  return { settings: { system }, messages };
}

function called(value: unknown): object {
  const { id, function: of } = object(value, "a call");
  return { id, ...object(of, "a call") };
}

function chatOf(value: unknown, i: number): Chat {
  const given = object(value, `conversation ${i}`);
  const messages: Message[] = [];
  const known = new Set<string>();
  for (const [j, item] of list(given.messages, `messages of conversation ${i}`).entries()) {
    const message = messageOf(item, `message ${j} of conversation ${i}`);
    // A parent stands before its children, so that there are no cycles.
    if (known.has(message.id) || (message.parent !== null && !known.has(message.parent)))
      throw new Error(`Message ${j} of conversation ${i} has no place in the tree.`);
    known.add(message.id);
    messages.push(message);
  }
  const shown = Object.entries(object(given.shown ?? {}, `"shown" of conversation ${i}`));
  return {
    id: newId(),
    title: typeof given.title === "string" ? given.title.slice(0, 200) : titleOf(messages[0]?.text ?? ""),
    created: number(given.created) ?? Date.now(),
    updated: number(given.updated) ?? Date.now(),
    settings: settingsOf(given.settings),
    messages,
    shown: Object.fromEntries(shown.filter((entry): entry is [string, string] => known.has(entry[1] as string))),
  };
}

function messageOf(value: unknown, what: string): Message {
  const given = object(value, what);
  const { id, parent, role, text } = given;
  const placed = typeof id === "string" && id !== "" && (parent === null || typeof parent === "string");
  if (!placed || !isOf(ROLES, role) || typeof text !== "string") throw new Error(`There is something wrong with ${what}.`);
  const message: Message = { id, parent, role, text, created: number(given.created) ?? Date.now() };
  if (typeof given.reasoning === "string") message.reasoning = given.reasoning;
  if (typeof given.model === "string") message.model = given.model;
  if (isOf(FINISHES, given.finish)) message.finish = given.finish;
  if (typeof given.call === "string") message.call = given.call;
  if (given.calls !== undefined) message.calls = list(given.calls, `"calls" of ${what}`).map(callOf);
  if (given.stats !== undefined) {
    const stats = object(given.stats, `"stats" of ${what}`);
    message.stats = { firstMs: number(stats.firstMs) ?? 0 };
    for (const name of ["rate", "written", "used", "cached"] as const satisfies (keyof Stats)[]) {
      const count = number(stats[name]);
      if (count !== undefined) message.stats[name] = count;
    }
  }
  if (given.tokens !== undefined) message.tokens = list(given.tokens, `"tokens" of ${what}`).map(tokenOf);
  return message;
}

function callOf(value: unknown): Call {
  const { id, name, arguments: given } = object(value, "a call");
  if (typeof id !== "string" || typeof name !== "string" || typeof given !== "string")
    throw new Error("There is something wrong with a call.");
  return { id, name, arguments: given };
}

const isOf = <T>(values: readonly T[], value: unknown): value is T => values.includes(value as T);

function tokenOf(value: unknown): Token {
  const alternative = (of: unknown) => {
    const { text, logprob } = object(of, "a token");
    if (typeof text !== "string" || number(logprob) === undefined) throw new Error("There is something wrong with a token.");
    return { text, logprob: logprob as number };
  };
  return { ...alternative(value), top: list((value as Token).top, "a token's alternatives").map(alternative) };
}

function object(value: unknown, what: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error(`There is something wrong with ${what}.`);
  return value as Record<string, unknown>;
}

function list(value: unknown, what: string): unknown[] {
  if (!Array.isArray(value)) throw new Error(`There is something wrong with ${what}.`);
  return value;
}

function number(value: unknown): number | undefined {
  return typeof value === "number" && Number.isFinite(value) ? value : undefined;
}
