/** Markdown as nodes, block by block, so that a growing text changes its last block only. */

import { Marked, type RendererObject, type Token, type TokenizerAndRendererExtension } from "marked";
import { sanitised } from "./sanitise";

/** Code of more characters is shown without colours. */
const MOST_COLOURED = 50_000;

const escaped = (text: string): string =>
  text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

const renderer: RendererObject = {
  // What looks like HTML is text.
  html: ({ text }) => escaped(text),
  // Nothing is fetched: an address in an answer could tell others what was asked.
  image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
  checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
};

const math = (display: boolean, tex: string): string =>
  `<code class="math${display ? " math-display" : ""}">${escaped(tex.trim())}</code>`;

/** TeX between signs, as models write it. */
function formula(name: string, level: "block" | "inline", pattern: RegExp, display: boolean): TokenizerAndRendererExtension {
  const sign = new RegExp(pattern.source.slice(1), pattern.flags);
  return {
    name,
    level,
    start: (text) => (level === "inline" ? text.search(sign) : undefined),
    tokenizer(text) {
      const found = pattern.exec(text);
      return found ? { type: name, raw: found[0], tex: found[1] } : undefined;
    },
    renderer: ({ tex }) => (level === "block" ? `<p>${math(display, tex)}</p>` : math(display, tex)),
  };
}

const marked = new Marked({
  gfm: true,
  renderer,
  extensions: [
    formula("mathBlock", "block", /^ {0,3}\$\$([^$]+)\$\$(?:\n|$)/, true),
    formula("mathBrackets", "block", /^ {0,3}\\\[([\s\S]+?)\\\](?:\n|$)/, true),
    formula("mathDisplay", "inline", /^\$\$([^$\n]+)\$\$/, true),
    formula("mathParentheses", "inline", /^\\\(([^\n]+?)\\\)/, false),
    // Not prices: no space inside of the signs, and no digit behind them.
    formula("mathDollars", "inline", /^\$((?!\s)[^$\n]*[^\s$\\])\$(?!\d)/, false),
  ],
});

const sources = new WeakMap<Element, string>();

/** Fills an element with a text, and keeps the nodes of its blocks that have not changed. */
export function show(element: Element, text: string): void {
  const blocks = marked.lexer(text).filter(({ type }) => type !== "space" && type !== "def");
  blocks.forEach((block, i) => {
    const old = element.children[i];
    if (old && sources.get(old) === block.raw) return;
    const node = rendered(block);
    sources.set(node, block.raw);
    if (old) old.replaceWith(node);
    else element.append(node);
  });
  while (element.children.length > blocks.length) element.lastElementChild!.remove();
}

function rendered(block: Token): Element {
  const node = document.createElement("div");
  node.append(sanitised(marked.parser([block])));
  node.querySelectorAll<HTMLElement>("pre > code").forEach(frameCode);
  node.querySelectorAll<HTMLElement>("code.math").forEach(setFormula);
  node.querySelectorAll<HTMLElement>("table").forEach((table) => {
    const scroller = scrolling(document.createElement("div"), "Table");
    table.replaceWith(scroller);
    scroller.append(table);
  });
  return node;
}

/** An element that can be scrolled sideways, with the keyboard too. */
function scrolling<E extends HTMLElement>(element: E, label: string): E {
  element.classList.add("scrolls");
  element.tabIndex = 0;
  element.setAttribute("role", "region");
  element.setAttribute("aria-label", label);
  return element;
}

function frameCode(code: HTMLElement): void {
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  const frame = document.createElement("div");
  const head = document.createElement("div");
  const label = document.createElement("span");
  const button = document.createElement("button");
  frame.className = "code";
  label.textContent = language || "text";
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy code");
  button.dataset.copy = "";
  head.append(label, button);
  code.parentElement!.replaceWith(frame);
  const pre = scrolling(document.createElement("pre"), `Code, ${language || "text"}`);
  pre.append(code);
  frame.append(head, pre);
  const text = (code.textContent ?? "").replace(/\n$/, "");
  code.textContent = text;
  if (language && text.length <= MOST_COLOURED)
    void import("./highlight").then(({ highlighted }) => {
      const html = highlighted(text, language.toLowerCase());
      if (html) code.replaceChildren(sanitised(html));
    });
}

function setFormula(code: HTMLElement): void {
  const tex = code.textContent ?? "";
  void import("./math").then(({ formula }) => {
    const node = formula(tex, code.classList.contains("math-display"));
    if (node) code.replaceWith(node);
  });
}
