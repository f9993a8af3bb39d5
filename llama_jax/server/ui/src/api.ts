/** The server's API: requests with the reader's key, typed errors, and streams of events. */

import type { Call, Message, Token } from "./conversation";

export interface Model {
  id: string;
  max_model_len?: number | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number };
}

/** A part of a call: it is joined to what came before under the same index. */
interface CallDelta {
  index: number;
  id?: string;
  function?: { name?: string; arguments?: string };
}

/** A part of an answer. */
export interface Delta {
  text?: string;
  reasoning?: string;
  tokens?: Token[];
  calls?: CallDelta[];
  finish?: "stop" | "length" | "tool_calls";
  usage?: Usage;
}

/** Calls with more of them. */
export function joined(calls: Call[], more: CallDelta[]): Call[] {
  const all = [...calls];
  for (const { index, id, function: part } of more) {
    const before = all[index] ?? { id: "", name: "", arguments: "" };
    all[index] = {
      id: id ?? before.id,
      name: part?.name ?? before.name,
      arguments: before.arguments + (part?.arguments ?? ""),
    };
  }
  return all;
}

export class ApiError extends Error {
  /** @param status: HTTP's, 0 where the server was not reached or has broken off.
   *  @param retryAfterS: seconds after which it may be asked again, if it said so. */
  constructor(
    message: string,
    readonly status = 0,
    readonly code = "",
    readonly retryAfterS?: number,
  ) {
    super(message);
  }

  /** What the reader can do. */
  get advice(): string {
    if (this.status === 401) return "Enter the server's key in the settings.";
    if (this.status === 403) return "Open the page under a name that the server knows (--allowed-host).";
    if (this.status === 429) return "The server is busy. Try again in a moment.";
    if (this.status === 503) return "The server takes no requests now. Try again in a moment.";
    if (this.code === "context_length_exceeded")
      return "The conversation no longer fits: edit an earlier message, ask for fewer tokens, or begin a new one.";
    if (this.code === "model_not_found") return "Choose another model.";
    if (this.status === 0) return "Is the server still running? Try again.";
    return "";
  }
}

const NAME = "llama_jax.key";

/** The key, kept until the tab is closed, or for longer if the reader wants that. */
export const key = {
  get: (): string => sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? "",
  remembered: (): boolean => localStorage.getItem(NAME) !== null,
  set(value: string, remember: boolean): void {
    for (const storage of [sessionStorage, localStorage]) storage.removeItem(NAME);
    if (value) (remember ? localStorage : sessionStorage).setItem(NAME, value);
  },
};

/** Sends a request; relative, so that a proxy may serve all of this below a path.
 *  @throws ApiError: anything but success; DOMException: it was aborted. */
export async function request(path: string, body?: object, signal?: AbortSignal): Promise<Response> {
  const headers: Record<string, string> = body ? { "content-type": "application/json" } : {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const init: RequestInit = { headers, signal: signal ?? null, cache: "no-store" };
  if (body) Object.assign(init, { method: "POST", body: JSON.stringify(body) });
  let response: Response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response: Response): Promise<ApiError> {
  const after = response.headers.get("retry-after");
  const seconds = after !== null && Number.isFinite(Number(after)) ? Number(after) : undefined;
  const body: unknown = await response.json().catch(() => undefined);
  const error = (body as { error?: { message?: string; code?: string } } | undefined)?.error;
  const message = error?.message ?? `The server answered with status ${response.status}.`;
  return new ApiError(message, response.status, error?.code ?? "", seconds);
}

export async function models(): Promise<Model[]> {
  return ((await (await request("v1/models")).json()) as { data: Model[] }).data;
}

export async function version(): Promise<string> {
  return ((await (await request("version")).json()) as { version: string }).version;
}

/** Token ids of a text or of messages, as the model reads them. */
export async function tokenize(body: object, signal?: AbortSignal): Promise<number[]> {
  return ((await (await request("tokenize", body, signal)).json()) as { tokens: number[] }).tokens;
}

/** Messages as the server takes them. */
export function wire(system: string, messages: Message[]): object[] {
  const said = messages.map(({ role, text, calls, call }) => ({
    role,
    content: text,
    ...(calls && { tool_calls: calls.map(({ id, ...called }) => ({ id, type: "function", function: called })) }),
    ...(call && { tool_call_id: call }),
  }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

/** Data of server-sent events, without that which ends the stream.
 *  @throws ApiError: the server tells of an error, or breaks off. */
async function* events(response: Response): AsyncGenerator<Chunk> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop()!;
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue; // an empty line, or a comment that keeps the connection alive
        if (line === "data: [DONE]") return;
        const data = JSON.parse(line.slice(6)) as Chunk & { error?: { message: string; code: string } };
        if (data.error) throw new ApiError(data.error.message, 500, data.error.code);
        yield data;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The connection was lost.");
    throw error;
  } finally {
    void reader.cancel().catch(() => undefined);
  }
  throw new ApiError("The answer broke off.");
}

interface ChatLogprob {
  token: string;
  logprob: number;
  top_logprobs?: { token: string; logprob: number }[];
}

interface Chunk {
  usage?: Usage | null;
  choices: {
    finish_reason: "stop" | "length" | "tool_calls" | null;
    delta?: { content?: string | null; reasoning_content?: string | null; tool_calls?: CallDelta[] | null };
    text?: string;
    logprobs?: {
      content?: ChatLogprob[] | null;
      tokens?: string[];
      token_logprobs?: (number | null)[];
      top_logprobs?: (Record<string, number> | null)[];
    } | null;
  }[];
}

/** The answer to a request, of chats or completions, as it comes. */
export async function* stream(path: string, body: object, signal: AbortSignal): AsyncGenerator<Delta> {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  for await (const { choices, usage } of events(await request(path, asked, signal))) {
    const [choice] = choices;
    const delta: Delta = {};
    if (usage) delta.usage = usage;
    if (choice) {
      const text = choice.text ?? choice.delta?.content;
      if (text) delta.text = text;
      if (choice.delta?.reasoning_content) delta.reasoning = choice.delta.reasoning_content;
      if (choice.delta?.tool_calls) delta.calls = choice.delta.tool_calls;
      if (choice.logprobs) delta.tokens = tokensOf(choice.logprobs);
      if (choice.finish_reason) delta.finish = choice.finish_reason;
    }
    yield delta;
  }
}

function tokensOf(logprobs: NonNullable<Chunk["choices"][number]["logprobs"]>): Token[] {
  if (logprobs.content)
    return logprobs.content.map(({ token, logprob, top_logprobs }) => ({
      text: token,
      logprob,
      top: (top_logprobs ?? []).map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  return (logprobs.tokens ?? []).map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs?.[i] ?? 0,
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([text, logprob]) => ({ text, logprob })),
  }));
}
