/** Conversations in the browser's IndexedDB. */

import type { Conversation } from "./conversation";
import type { Settings } from "./settings";

export type Chat = Conversation<Settings>;

const STORE = "conversations";

const opened = new Promise<IDBDatabase>((resolve, reject) => {
  const opening = indexedDB.open("llama_jax", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
  opening.onsuccess = () => resolve(opening.result);
  opening.onerror = () => reject(opening.error);
});

async function done<T>(mode: IDBTransactionMode, act: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const transaction = (await opened).transaction(STORE, mode);
  const asked = act(transaction.objectStore(STORE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(asked.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** Tells other tabs of the page which conversation has changed; a tab does not hear itself. */
export const news = new BroadcastChannel("llama_jax");

export const all = (): Promise<Chat[]> => done("readonly", (store) => store.getAll());

export const one = (id: string): Promise<Chat | undefined> => done("readonly", (store) => store.get(id));

export async function put(chat: Chat): Promise<void> {
  await done("readwrite", (store) => store.put(chat));
  news.postMessage(chat.id);
}

export async function remove(id: string): Promise<void> {
  await done("readwrite", (store) => store.delete(id));
  news.postMessage(id);
}
