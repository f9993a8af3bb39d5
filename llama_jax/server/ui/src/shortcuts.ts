/** Keys, and what they do. */

import { currentId, dialog, drawer, live, open } from "./state";

const CONTROL = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘" : "Ctrl";

export const SHORTCUTS = [
  { keys: "Enter", does: "Send the message" },
  { keys: "Shift + Enter", does: "New line" },
  { keys: "Esc", does: "Stop the answer; close what is open" },
  { keys: "/", does: "Write a message" },
  { keys: `${CONTROL} + K`, does: "Search conversations" },
  { keys: `${CONTROL} + Shift + O`, does: "New conversation" },
  { keys: `${CONTROL} + ,`, does: "Settings" },
  { keys: "↑", does: "Edit the last message, from an empty field" },
  { keys: `${CONTROL} + Enter`, does: "Send an edited message" },
  { keys: "?", does: "This list" },
];

const focus = (selector: string): void => document.querySelector<HTMLElement>(selector)?.focus();

const WITH_CONTROL: Record<string, () => void> = {
  k: () => {
    drawer.value = matchMedia("(width < 48rem)").matches;
    focus("#search");
    setTimeout(() => focus("#search")); // once the list is there
  },
  ",": () => (dialog.value = "settings"),
};

const ALONE: Record<string, () => void> = {
  "/": () => focus("#composer"),
  "?": () => (dialog.value = "shortcuts"),
};

function inField(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && target.matches("input, textarea, select");
}

function actionOf(event: KeyboardEvent): (() => void) | undefined {
  if (dialog.value) return undefined;
  const control = event.ctrlKey || event.metaKey;
  if (control && event.shiftKey && event.key.toLowerCase() === "o")
    return () => {
      open(null);
      setTimeout(() => focus("#composer"));
    };
  if (control && !event.shiftKey) return WITH_CONTROL[event.key];
  if (control || event.altKey) return undefined;
  if (event.key === "Escape") return drawer.value ? () => (drawer.value = false) : live.value?.stop;
  if (event.key === "ArrowUp" && event.target instanceof HTMLTextAreaElement && event.target.id === "composer" && !event.target.value)
    return currentId.value ? editLast : undefined;
  return inField(event.target) ? undefined : ALONE[event.key];
}

const editLast = (): void =>
  [...document.querySelectorAll<HTMLElement>(".message.user button[aria-label=Edit]")].at(-1)?.click();

export function listen(): void {
  addEventListener("keydown", (event) => {
    const act = actionOf(event);
    if (!act) return;
    event.preventDefault();
    act();
  });
}
