/** What a reader does with a conversation: send, edit, answer anew, continue, stop. */

import { batch } from "@preact/signals";
import { type Delta, joined, stream, tokenize, wire } from "./api";
import { added, type Call, changed, type Finish, type Message, newId, path, pathTo, removed, titleOf } from "./conversation";
import { fieldsOf, toolsOf } from "./settings";
import type { Chat } from "./storage";
import { add, chats, connect, created, current, fail, forgive, type Live, lives, model, spoken, update, without } from "./state";

/** Milliseconds between two times that an unfinished answer is kept. */
const KEPT_MS = 2000;
/** Milliseconds within which tokens came together. */
const BURST_MS = 5;
const ALTERNATIVES = 5;

const find = (id: string): Chat => chats.value.find((chat) => chat.id === id)!;

const message = (role: Message["role"], parent: string | null, text: string): Message => ({
  id: newId(),
  parent,
  role,
  text,
  created: Date.now(),
});

/** Sends a text in the open conversation, or begins one with it. */
export function send(text: string): void {
  if (!current.value) add(created(titleOf(text)));
  const chat = current.value!;
  const said = message("user", path(chat).at(-1)?.id ?? null, text);
  update(chat.id, (chat) => added(chat, said));
  void answer(chat.id, said.id);
}

/** Another text in the place of a message: a branch of its own, which is answered if a reader said it. */
export function edit(chat: Chat, before: Message, text: string): void {
  const after = { ...message(before.role, before.parent, text), ...(before.role === "assistant" && { finish: "stopped" as Finish }) };
  update(chat.id, (chat) => added(chat, after));
  if (before.role === "user") void answer(chat.id, after.id);
}

/** What the tools have returned that an answer wants called, in the order of its calls; the model goes on from there. */
export function report(chat: Chat, calling: Message, results: string[]): void {
  let parent = calling.id;
  for (const [i, { id: call }] of calling.calls!.entries()) {
    const result = { ...message("tool", parent, results[i]!), call };
    update(chat.id, (chat) => added(chat, result));
    parent = result.id;
  }
  void answer(chat.id, parent);
}

/** Another answer in the place of one, which stays as a branch. */
export const regenerate = (chat: Chat, before: Message): void => void answer(chat.id, before.parent!);

/** An answer to a message. */
export async function answer(chatId: string, parent: string): Promise<void> {
  const chat = find(chatId);
  const answering: Message = { ...message("assistant", parent, ""), model: model.value?.id ?? "" };
  await run(chatId, answering, () => answer(chatId, parent), async () => {
    update(chatId, (chat) => added(chat, answering));
    const { system, probabilities } = chat.settings;
    const body = { ...fieldsOf(chat.settings), ...toolsOf(chat.settings), messages: wire(system, pathTo(chat.messages, parent)) };
    return ["v1/chat/completions", probabilities ? { ...body, logprobs: true, top_logprobs: ALTERNATIVES } : body];
  });
}

/** Whether an answer is incomplete, and its prompt can be made again: what templates do with tools and reasoning, and what a
 *  grammar has already seen, is known to the server alone. */
export function continuable({ settings: { format, tools } }: Chat, { finish, reasoning, calls }: Message): boolean {
  const complete = finish === "stop" || finish === "tool_calls";
  return !complete && !reasoning && !calls && format === "text" && !tools.trim();
}

/** More of an answer. The template would end the message before anything could be added, so that the prompt is made of
 *  tokens: those of the conversation, and behind them those of the answer so far. */
export async function continued(chatId: string, before: Message): Promise<void> {
  const chat = find(chatId);
  const writer = model.value?.id;
  await run(chatId, before, () => continued(chatId, before), async (signal) => {
    const { system, probabilities, max_tokens } = chat.settings;
    const messages = wire(system, pathTo(chat.messages, before.parent));
    const [head, tail] = await Promise.all([
      tokenize({ model: writer, messages }, signal),
      tokenize({ model: writer, prompt: before.text, add_special_tokens: false }, signal),
    ]);
    const prompt = [...head, ...tail];
    const room = Math.max(1, (model.value?.max_model_len ?? Infinity) - prompt.length);
    const body = { model: writer, ...fieldsOf(chat.settings), prompt, max_tokens: Math.min(room, max_tokens ?? room) };
    return ["v1/completions", probabilities ? { ...body, logprobs: ALTERNATIVES } : body];
  });
}

type Asked = [path: string, body: object];

async function run(
  chatId: string,
  answering: Message,
  again: () => void,
  ask: (signal: AbortSignal) => Promise<Asked>,
): Promise<void> {
  if (lives.value[chatId]) return;
  const stopping = new AbortController();
  const { id, text, reasoning = "", tokens = [], calls = [] as Call[] } = answering;
  const began = performance.now();
  const now: Live = { message: id, text, reasoning, tokens: [...tokens], calls, began, stop: () => stopping.abort() };
  let first = 0;
  let last = 0;
  let kept = began;
  let finish: Finish = "error";
  let usage: Delta["usage"];
  const show = animated(() => (lives.value = { ...lives.value, [chatId]: { ...now } }));
  const texts = (): Partial<Message> => ({
    text: now.text,
    ...(now.reasoning && { reasoning: now.reasoning }),
    ...(now.tokens.length && { tokens: now.tokens }),
    ...(now.calls.length && { calls: now.calls }),
  });

  forgive(chatId);
  lives.value = { ...lives.value, [chatId]: now };
  spoken.value = "Answering";
  let problem: unknown;
  try {
    const [path, body] = await ask(stopping.signal);
    for await (const delta of stream(path, { model: model.value?.id, ...body }, stopping.signal)) {
      usage = delta.usage ?? usage;
      finish = delta.finish ?? finish;
      if (delta.text || delta.reasoning || delta.calls || delta.tokens?.length) {
        last = performance.now();
        first ||= last;
        now.text += delta.text ?? "";
        now.reasoning += delta.reasoning ?? "";
        now.calls = joined(now.calls, delta.calls ?? []);
        now.tokens.push(...(delta.tokens ?? []));
        show.soon();
      }
      if (last - kept > KEPT_MS) {
        kept = last;
        update(chatId, (chat) => changed(chat, id, texts()));
      }
    }
  } catch (error) {
    if (stopping.signal.aborted) finish = "stopped";
    else problem = error;
  }
  show.cancel();
  const stats = first ? { firstMs: first - began, ...counted(usage, last - first, answering) } : undefined;
  batch(() => {
    lives.value = without(lives.value, chatId);
    update(chatId, (chat) =>
      now.text || now.reasoning || now.calls.length || finish === "stop" || finish === "length"
        ? changed(chat, id, { ...texts(), finish, ...(stats && { stats }) })
        : removed(chat, id),
    );
    if (problem) fail(chatId, problem, again);
    else spoken.value = finish === "stopped" ? "Stopped" : "Answered";
  });
  if (stats && !model.value?.max_model_len) void connect(); // known once the model is loaded
  if (stats && !usage) await measure(chatId, id);
}

/** Counts the tokens of a conversation up to an answer for which the server has not done so. */
async function measure(chatId: string, id: string): Promise<void> {
  const { messages, settings } = find(chatId);
  const said = wire(settings.system, pathTo(messages, id));
  const body = { model: model.value?.id, messages: said, add_generation_prompt: false };
  const used = (await tokenize(body).catch(() => [])).length;
  const stats = messages.find((message) => message.id === id)?.stats;
  if (used && stats) update(chatId, (chat) => changed(chat, id, { stats: { ...stats, used } }));
}

function counted(usage: Delta["usage"], elapsedMs: number, { text, stats }: Message) {
  if (!usage) return {};
  const written = usage.completion_tokens;
  const before = text ? stats?.written : 0;
  return {
    ...(before !== undefined && { written: before + written }),
    used: usage.total_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    // The first token's time is that of the prompt; what comes in one piece has no speed.
    ...(written > 1 && elapsedMs > BURST_MS && { rate: (1e3 * (written - 1)) / elapsedMs }),
  };
}

/** A function that runs at most once a frame. Where nothing is drawn, as in a tab behind others, it does not run. */
function animated(act: () => void) {
  let frame = 0;
  return {
    soon: () => void (frame ||= requestAnimationFrame(() => ((frame = 0), act()))),
    cancel: () => cancelAnimationFrame(frame),
  };
}
