/** Formulas as MathML, which browsers draw without fonts or styles of ours; loaded with the first formula. */

import katex from "katex";

/** TeX as a node, undefined where it is not understood. */
export function formula(tex: string, displayMode: boolean): Element | undefined {
  const node = document.createElement("span");
  node.className = displayMode ? "formula display" : "formula";
  try {
    katex.render(tex, node, { displayMode, output: "mathml", trust: false, strict: "ignore", maxSize: 20, maxExpand: 500 });
  } catch {
    return undefined;
  }
  return node;
}
