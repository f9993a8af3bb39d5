/** Dialogs: settings, and the list of shortcuts. */

import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { IconButton } from "./icons";
import { FORMATS, type FormatKind, NUMBERS, PRESETS, type Settings, schemaProblem, toolsProblem } from "./settings";
import { SHORTCUTS } from "./shortcuts";
import { change, connect, dialog, failures, NONE, presets, settings, theme, without } from "./state";

/** A modal dialog; the browser holds the focus in it, and Escape closes it. */
function Modal({ title, children }: { title: string; children: ComponentChildren }) {
  const element = useRef<HTMLDialogElement>(null);
  useEffect(() => element.current!.showModal(), []);
  return (
    <dialog
      ref={element}
      aria-labelledby="dialog-title"
      onClose={() => (dialog.value = null)}
      onClick={(event) => event.target === element.current && element.current!.close()}
    >
      <div class="dialog">
        <div class="row head">
          <h2 id="dialog-title">{title}</h2>
          <span class="space" />
          <IconButton icon="close" label="Close" onClick={() => element.current!.close()} />
        </div>
        {children}
      </div>
    </dialog>
  );
}

export function Dialogs() {
  if (dialog.value === "settings") return <SettingsDialog />;
  if (dialog.value === "shortcuts") return <Shortcuts />;
  return null;
}

function Shortcuts() {
  return (
    <Modal title="Keyboard shortcuts">
      <dl class="shortcuts">
        {SHORTCUTS.map(({ keys, does }) => (
          <div key={keys}>
            <dt>
              <kbd>{keys}</kbd>
            </dt>
            <dd>{does}</dd>
          </div>
        ))}
      </dl>
    </Modal>
  );
}

function SettingsDialog() {
  const { system, stop, probabilities } = settings.value;
  return (
    <Modal title="Settings">
      <Key />
      <fieldset>
        <legend>Conversation</legend>
        <Presets />
        <label>
          System prompt
          <textarea rows={3} value={system} onInput={(event) => change({ system: event.currentTarget.value })} />
        </label>
        <div class="numbers">
          {NUMBERS.map((field) => (
            <NumberField key={field.name} {...field} />
          ))}
        </div>
        <label>
          Stop strings
          <textarea
            rows={2}
            placeholder="One a line, at most four"
            value={stop}
            onInput={(event) => change({ stop: event.currentTarget.value })}
          />
        </label>
        <Format />
        <JsonArea
          label="Tools"
          rows={2}
          placeholder="A JSON list, in the shape of OpenAI’s"
          value={settings.value.tools}
          problem={toolsProblem(settings.value.tools)}
          set={(tools) => change({ tools })}
        />
        <label class="check">
          <input
            type="checkbox"
            checked={probabilities}
            onChange={(event) => change({ probabilities: event.currentTarget.checked })}
          />
          Ask for token probabilities
        </label>
      </fieldset>
      <fieldset>
        <legend>Appearance</legend>
        <div class="row" role="group" aria-label="Colours">
          {(["auto", "light", "dark"] as const).map((name) => (
            <label key={name} class="check">
              <input type="radio" name="theme" checked={theme.value === name} onChange={() => (theme.value = name)} />
              {{ auto: "As the system", light: "Light", dark: "Dark" }[name]}
            </label>
          ))}
        </div>
      </fieldset>
      <About />
    </Modal>
  );
}

function Key() {
  const input = useRef<HTMLInputElement>(null);
  const [remember, setRemember] = useState(api.key.remembered());
  const refused = failures.value[NONE]?.error.status === 401;

  async function save(event: Event): Promise<void> {
    event.preventDefault();
    api.key.set(input.current!.value.trim(), remember);
    dialog.value = null;
    await connect();
  }

  return (
    <form onSubmit={(event) => void save(event)}>
      <fieldset class={refused ? "wanted" : ""}>
        <legend>Server</legend>
        <label for="key">API key</label>
        <div class="row">
          <input
            id="key"
            ref={input}
            type="password"
            autocomplete="off"
            spellcheck={false}
            autofocus={refused}
            defaultValue={api.key.get()}
            aria-describedby="key-help"
          />
          <button type="submit" class="primary">
            Use
          </button>
        </div>
        <p class="faint" id="key-help">
          {refused ? "The server needs a key, or knows another. " : ""}Sent to this server only.
        </p>
        <label class="check">
          <input type="checkbox" checked={remember} onChange={(event) => setRemember(event.currentTarget.checked)} />
          Keep it in this browser when the tab is closed
        </label>
      </fieldset>
    </form>
  );
}

function Presets() {
  const [chosen, setChosen] = useState("");
  const name = useRef<HTMLInputElement>(null);
  const known: Record<string, Settings> = { ...PRESETS, ...presets.value };

  function choose(preset: string): void {
    setChosen(preset);
    if (known[preset]) change(known[preset]);
  }

  function save(): void {
    const given = name.current!.value.trim();
    if (!given || given in PRESETS) return name.current!.focus();
    presets.value = { ...presets.value, [given]: settings.value };
    name.current!.value = "";
    setChosen(given);
  }

  return (
    <div class="presets">
      <label>
        Preset
        <select value={chosen} onChange={(event) => choose(event.currentTarget.value)}>
          <option value="">Choose…</option>
          {Object.keys(known).map((preset) => (
            <option key={preset}>{preset}</option>
          ))}
        </select>
      </label>
      <label>
        Keep these settings as
        <span class="row">
          <input ref={name} maxLength={60} placeholder="Name" />
          <button type="button" onClick={save}>
            Keep
          </button>
        </span>
      </label>
      {chosen in presets.value && (
        <button type="button" class="danger" onClick={() => ((presets.value = without(presets.value, chosen)), setChosen(""))}>
          Delete “{chosen}”
        </button>
      )}
    </div>
  );
}

function NumberField({ name, label, help, min, max, step }: (typeof NUMBERS)[number]) {
  const value = settings.value[name];
  const wrong = value !== null && (value < min || value > max);
  return (
    <label title={help}>
      {label}
      <input
        type="number"
        min={min}
        max={max}
        step={step}
        placeholder="server’s"
        value={value ?? ""}
        aria-invalid={wrong}
        aria-description={help}
        onInput={({ currentTarget: { value, valueAsNumber } }) =>
          change({ [name]: value === "" || Number.isNaN(valueAsNumber) ? null : valueAsNumber })
        }
      />
    </label>
  );
}

function Format() {
  const { format, schema, regex } = settings.value;
  return (
    <>
      <label>
        Form of answers
        <select value={format} onChange={(event) => change({ format: event.currentTarget.value as FormatKind })}>
          {FORMATS.map(({ kind, label }) => (
            <option key={kind} value={kind}>
              {label}
            </option>
          ))}
        </select>
      </label>
      {format === "schema" && (
        <JsonArea label="JSON schema" rows={8} value={schema} problem={schemaProblem(schema)} set={(schema) => change({ schema })} />
      )}
      {format === "regex" && (
        <label>
          Regular expression
          <textarea
            class="mono"
            rows={2}
            spellcheck={false}
            value={regex}
            onInput={(event) => change({ regex: event.currentTarget.value })}
          />
        </label>
      )}
    </>
  );
}

interface JsonAreaProps {
  label: string;
  rows: number;
  value: string;
  problem: string;
  placeholder?: string;
  set: (value: string) => void;
}

function JsonArea({ label, problem, set, ...rest }: JsonAreaProps) {
  return (
    <label>
      {label}
      <textarea
        {...rest}
        class="mono"
        spellcheck={false}
        aria-invalid={problem !== ""}
        onInput={(event) => set(event.currentTarget.value)}
      />
      <span class="wrong" role="status">
        {problem}
      </span>
    </label>
  );
}

function About() {
  const [version, setVersion] = useState("");
  useEffect(() => void api.version().then(setVersion, () => setVersion("")), []);
  return (
    <p class="faint">
      llama_jax {version} · <a href="ui/licenses.txt">licences of what this page is made of</a>
    </p>
  );
}
