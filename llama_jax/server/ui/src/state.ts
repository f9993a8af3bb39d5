/** What the page knows, and the ways in which it changes. */

import { batch, computed, effect, signal } from "@preact/signals";
import * as api from "./api";
import { ApiError, type Model } from "./api";
import { type Call, newId, path, type Token } from "./conversation";
import { type Settings, settingsOf } from "./settings";
import * as storage from "./storage";
import type { Chat } from "./storage";

/** An answer that is under way. */
export interface Live {
  message: string;
  text: string;
  reasoning: string;
  tokens: Token[];
  calls: Call[];
  began: number;
  stop: () => void;
}

/** A request that has failed, and how to ask again. */
export interface Failure {
  error: ApiError;
  again?: () => void;
}

export type Dialog = "settings" | "shortcuts" | null;

function stored<T>(name: string, read: (value: unknown) => T) {
  let value: unknown;
  try {
    value = JSON.parse(localStorage.getItem(name) ?? "null");
  } catch {
    value = null;
  }
  const kept = signal(read(value));
  effect(() => localStorage.setItem(name, JSON.stringify(kept.value)));
  return kept;
}

export const chats = signal<Chat[]>([]);
export const currentId = signal<string | null>(null);
export const lives = signal<Record<string, Live>>({});
export const failures = signal<Record<string, Failure>>({});
export const models = signal<Model[]>([]);
export const dialog = signal<Dialog>(null);
/** Text that a screen reader speaks. */
export const spoken = signal("");
/** Whether the list of conversations is open where it covers the page. */
export const drawer = signal(false);

export const theme = stored("llama_jax.theme", (value) => (value === "light" || value === "dark" ? value : "auto"));
export const modelName = stored("llama_jax.model", (value) => (typeof value === "string" ? value : ""));
/** Settings of the next new conversation: those that were chosen last. */
export const nextSettings = stored("llama_jax.settings", settingsOf);
export const presets = stored("llama_jax.presets", (value) =>
  Object.fromEntries(Object.entries(value ?? {}).map(([name, settings]) => [name, settingsOf(settings)])),
);

export const current = computed(() => chats.value.find(({ id }) => id === currentId.value) ?? null);
export const settings = computed<Settings>(() => current.value?.settings ?? nextSettings.value);
export const shown = computed(() => (current.value ? path(current.value) : []));
export const live = computed<Live | undefined>(() => lives.value[currentId.value ?? ""]);
export const failure = computed<Failure | undefined>(() => failures.value[currentId.value ?? ""]);
export const model = computed<Model | undefined>(
  () => models.value.find(({ id }) => id === modelName.value) ?? models.value[0],
);

/** Key of what concerns no conversation yet. */
export const NONE = "";

export function without<T>(record: Record<string, T>, name: string): Record<string, T> {
  const { [name]: _, ...rest } = record;
  return rest;
}

export function fail(id: string, error: unknown, again?: () => void): void {
  const known = error instanceof ApiError ? error : new ApiError((error as Error).message, -1);
  failures.value = { ...failures.value, [id]: again ? { error: known, again } : { error: known } };
  spoken.value = known.message;
}

export const forgive = (id: string): void => void (failures.value = without(failures.value, id));

/** Changes a conversation and keeps it. */
export function update(id: string, change: (chat: Chat) => Chat): void {
  const before = chats.value.find((chat) => chat.id === id);
  if (!before) return;
  const after = change(before);
  chats.value = chats.value.map((chat) => (chat.id === id ? after : chat));
  void keep(after);
}

async function keep(chat: Chat): Promise<void> {
  await storage.put(chat).catch((error: Error) => fail(chat.id, new ApiError(`Not kept: ${error.message}`, -1)));
}

/** Adds conversations, the first of which is opened. */
export function add(...more: Chat[]): void {
  chats.value = [...more, ...chats.value];
  for (const chat of more) void keep(chat);
  if (more[0]) open(more[0].id);
}

export function created(title: string): Chat {
  const now = Date.now();
  return { id: newId(), title, created: now, updated: now, settings: nextSettings.value, messages: [], shown: {} };
}

export function remove(id: string): void {
  lives.value[id]?.stop();
  batch(() => {
    chats.value = chats.value.filter((chat) => chat.id !== id);
    if (currentId.value === id) open(null);
  });
  void storage.remove(id);
}

export function change(part: Partial<Settings>): void {
  nextSettings.value = { ...settings.value, ...part };
  if (current.value) update(current.value.id, (chat) => ({ ...chat, settings: { ...chat.settings, ...part } }));
}

/** Opens a conversation, null a new one. The address names it, so that a reload and the back button find it. */
export function open(id: string | null): void {
  drawer.value = false;
  currentId.value = id;
  const hash = id ? `#${id}` : "";
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
}

function follow(): void {
  const id = location.hash.slice(1);
  currentId.value = chats.value.some((chat) => chat.id === id) ? id : null;
}

/** Asks the server which models it has; with the wrong key that is where it shows. */
export async function connect(): Promise<void> {
  try {
    models.value = await api.models();
    failures.value = Object.fromEntries(Object.entries(failures.value).filter(([, { error }]) => error.status !== 401));
    forgive(NONE);
  } catch (error) {
    fail(NONE, error, () => void connect());
    if (error instanceof ApiError && error.status === 401) dialog.value = "settings";
  }
}

/** Reads what is kept, and follows the address and other tabs from then on. */
export async function begin(): Promise<void> {
  void connect();
  try {
    chats.value = await storage.all();
  } catch (error) {
    fail(NONE, new ApiError(`This browser keeps no conversations: ${(error as Error).message}`, -1));
  }
  follow();
  addEventListener("popstate", follow);
  addEventListener("hashchange", follow);
  storage.news.onmessage = async ({ data: id }: MessageEvent<string>) => {
    if (lives.value[id]) return;
    const chat = await storage.one(id);
    const rest = chats.value.filter((other) => other.id !== id);
    chats.value = chat ? [chat, ...rest] : rest;
    if (!chat && currentId.value === id) open(null);
  };
}
