import "./styles/page.css";
import "./styles/controls.css";
import "./styles/text.css";
import { effect } from "@preact/signals";
import { render } from "preact";
import { Dialogs } from "./dialogs";
import { listen } from "./shortcuts";
import { Sidebar } from "./sidebar";
import { begin, current, drawer, spoken, theme } from "./state";
import { Thread } from "./thread";

function App() {
  return (
    <>
      <Sidebar />
      {drawer.value && <div class="veil" onClick={() => (drawer.value = false)} />}
      <Thread />
      <Dialogs />
      <div class="hidden" role="status" aria-live="polite">
        {spoken}
      </div>
    </>
  );
}

effect(() => void (document.documentElement.dataset.theme = theme.value));
effect(() => void (document.title = current.value ? `${current.value.title} · llama_jax` : "llama_jax"));
listen();
await begin();
render(<App />, document.getElementById("app")!);
