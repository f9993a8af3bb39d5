/** The open conversation. */

import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { answer, send } from "./answering";
import type { Message } from "./conversation";
import { grow, MessageView } from "./message";
import { Icon, IconButton } from "./icons";
import { current, currentId, dialog, drawer, failure, failures, forgive, live, model, modelName, models, NONE, settings, shown } from "./state";
import type { Failure } from "./state";

/** Pixels from the end within which the page follows what is written. */
const NEAR = 80;

export function Thread() {
  const scroller = useRef<HTMLElement>(null);
  const following = useRef(true);
  const chat = current.value;
  const messages = shown.value;
  const now = live.value;
  const last = messages.at(-1);

  useLayoutEffect(() => {
    following.current = true;
  }, [currentId.value, messages.length]);
  useLayoutEffect(() => {
    const element = scroller.current!;
    if (following.current) element.scrollTop = element.scrollHeight;
  });

  function scrolled(): void {
    const { scrollHeight, scrollTop, clientHeight } = scroller.current!;
    following.current = scrollHeight - scrollTop - clientHeight < NEAR;
  }

  const view = (message: Message) => (
    <MessageView
      key={message.id}
      chat={chat!}
      message={message}
      live={now?.message === message.id ? now : undefined}
      busy={now !== undefined}
      last={message === last}
    />
  );
  // The same nodes as before are not looked at again, while another message grows.
  const still = useMemo(() => messages.map(view), [chat, now === undefined]);

  const problem = failure.value ?? failures.value[NONE];
  return (
    <main class="thread">
      <Header />
      <section class="scroller" ref={scroller} onScroll={scrolled} tabIndex={0} aria-label="Messages">
        <div class="column">
          {!messages.length && !problem && <Welcome />}
          {chat && settings.value.system && messages.length > 0 && (
            <details class="system">
              <summary>System prompt</summary>
              <div class="said">{settings.value.system}</div>
            </details>
          )}
          {chat && messages.map((message, i) => (message.id === now?.message ? view(message) : still[i]))}
          {problem && <Problem failure={problem} dismiss={() => forgive((failure.value && currentId.value) || NONE)} />}
          {chat && last && last.role !== "assistant" && !now && !problem && (
            <div class="row">
              <button type="button" onClick={() => void answer(chat.id, last.id)}>
                Answer
              </button>
              <span class="faint">This message has no answer.</span>
            </div>
          )}
        </div>
      </section>
      <Composer key={currentId.value ?? NONE} />
    </main>
  );
}

function Header() {
  return (
    <header class="row header">
      <IconButton icon="menu" label="Conversations" class="phone" onClick={() => (drawer.value = true)} />
      <label class="picker">
        <span class="hidden">Model</span>
        <select value={model.value?.id ?? ""} onChange={(event) => (modelName.value = event.currentTarget.value)}>
          {models.value.length ? models.value.map(({ id }) => <option key={id}>{id}</option>) : <option>no model</option>}
        </select>
      </label>
      <span class="space" />
      <Meter />
      <IconButton icon="settings" label="Settings" onClick={() => (dialog.value = "settings")} />
    </header>
  );
}

/** How full the model's context is: as far as the last answer goes of which the tokens are known. */
function Meter() {
  const room = model.value?.max_model_len;
  const stats = shown.value.findLast(({ stats }) => stats?.used)?.stats;
  if (!room || !stats?.used) return null;
  const cached = stats.cached ?? 0;
  const count = (tokens: number) => tokens.toLocaleString("en");
  const text = `${count(stats.used)} of ${count(room)} tokens${cached ? `, ${count(cached)} cached` : ""}`;
  const share = Math.min(1, stats.used / room);
  return (
    <span class="context" title={`Context: ${text}`}>
      <svg
        viewBox="0 0 100 8"
        preserveAspectRatio="none"
        role="meter"
        aria-label="Context"
        aria-valuemin={0}
        aria-valuemax={room}
        aria-valuenow={stats.used}
        aria-valuetext={text}
        class={share > 0.9 ? "full" : ""}
      >
        <rect width="100" height="8" class="room" />
        <rect width={100 * share} height="8" class="used" />
        <rect width={Math.min(100, (100 * cached) / room)} height="8" class="cached" />
      </svg>
      <span class="faint" aria-hidden="true">
        {text}
      </span>
    </span>
  );
}

function Welcome() {
  return (
    <div class="welcome">
      <h1>What is on your mind?</h1>
      <p class="faint">
        {model.value ? `${model.value.id} answers on this server. ` : ""}Conversations stay in this browser.
      </p>
    </div>
  );
}

/** What went wrong and what can be done; it waits for as long as the server has said. */
function Problem({ failure: { error, again }, dismiss }: { failure: Failure; dismiss: () => void }) {
  const [left, setLeft] = useState(error.retryAfterS ?? 0);
  useEffect(() => {
    let wait = error.retryAfterS ?? 0;
    setLeft(wait);
    const timer = setInterval(() => (setLeft((wait = Math.max(0, wait - 1))), wait || clearInterval(timer)), 1000);
    return () => clearInterval(timer);
  }, [error]);
  return (
    <div class="problem" role="alert">
      <p>
        <strong>{error.message}</strong>
      </p>
      {error.advice && <p>{error.advice}</p>}
      <div class="row">
        {error.status === 401 && (
          <button type="button" class="primary" onClick={() => (dialog.value = "settings")}>
            Enter the key
          </button>
        )}
        {again && (
          <button type="button" disabled={left > 0} onClick={again}>
            {left > 0 ? `Try again in ${Math.ceil(left)} s` : "Try again"}
          </button>
        )}
        <button type="button" onClick={dismiss}>
          Dismiss
        </button>
      </div>
    </div>
  );
}

function Composer() {
  const area = useRef<HTMLTextAreaElement>(null);
  const [text, setText] = useState("");
  const now = live.value;
  useEffect(() => {
    if (matchMedia("(hover: hover)").matches) area.current?.focus();
  }, []);
  useLayoutEffect(() => grow(area.current), [text]);

  function submit(): void {
    if (now || !text.trim()) return;
    setText("");
    send(text);
  }

  function pressed(event: KeyboardEvent): void {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  }

  const { format, probabilities } = settings.value;
  return (
    <form class="composer column" onSubmit={(event) => (event.preventDefault(), submit())}>
      <div class="box">
        <textarea
          id="composer"
          ref={area}
          rows={1}
          placeholder="Message"
          aria-label="Message"
          value={text}
          onInput={(event) => setText(event.currentTarget.value)}
          onKeyDown={pressed}
        />
        {now ? (
          <button type="button" class="send" aria-label="Stop" title="Stop (Esc)" onClick={now.stop}>
            <Icon name="stop" />
          </button>
        ) : (
          <button type="submit" class="send" aria-label="Send" title="Send (Enter)" disabled={!text.trim()}>
            <Icon name="send" />
          </button>
        )}
      </div>
      <p class="faint hint">
        {[
          format === "text" ? "" : `Answers are ${format === "regex" ? "held to a regular expression" : "JSON"}.`,
          probabilities ? "Token probabilities are asked for." : "",
          "Models make mistakes.",
        ]
          .filter(Boolean)
          .join(" ")}
      </p>
    </form>
  );
}
