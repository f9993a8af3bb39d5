/** An answer token by token, with what the model held likely in each place. */

import { useState } from "preact/hooks";
import type { Token } from "./conversation";

const percent = (logprob: number): string => {
  const share = 100 * Math.exp(logprob);
  return `${share >= 10 ? share.toFixed(0) : share >= 0.1 ? share.toFixed(1) : "<0.1"} %`;
};

const visible = (text: string): string => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";

/** From 0, improbable, to 4. */
const level = (logprob: number): number => [0.05, 0.2, 0.5, 0.8].filter((bound) => Math.exp(logprob) >= bound).length;

/** One tab stop; arrow keys go from token to token. */
export function Tokens({ tokens }: { tokens: Token[] }) {
  const [at, setAt] = useState<number | null>(null);
  const token = at === null ? undefined : tokens[at];

  function step(event: KeyboardEvent): void {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const next = Math.min(tokens.length - 1, Math.max(0, (at ?? -1) + by));
    setAt(next);
    (event.currentTarget as Element).children[next]?.scrollIntoView({ block: "nearest" });
  }

  return (
    <div class="tokens">
      <div
        class="token-text"
        role="group"
        aria-label="Tokens; arrow keys go from one to the next"
        tabIndex={0}
        onKeyDown={step}
        onMouseLeave={() => setAt(null)}
      >
        {tokens.map(({ text, logprob }, i) => (
          <span
            key={i}
            class={`token level-${level(logprob)} ${i === at ? "at" : ""}`}
            onMouseEnter={() => setAt(i)}
            onClick={() => setAt(i)}
          >
            {text}
          </span>
        ))}
      </div>
      <div class="token-facts" aria-live="polite">
        {token ? (
          <dl>
            <div class="drawn">
              <dt>{visible(token.text)}</dt>
              <dd>{percent(token.logprob)}</dd>
            </div>
            {token.top
              .filter(({ text }) => text !== token.text)
              .map(({ text, logprob }, i) => (
                <div key={i}>
                  <dt>{visible(text)}</dt>
                  <dd>{percent(logprob)}</dd>
                </div>
              ))}
          </dl>
        ) : (
          "Point at a token to see how likely it was, and what else was."
        )}
      </div>
    </div>
  );
}
