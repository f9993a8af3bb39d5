/** Colours of code; loaded with the first code. */

import hljs from "highlight.js/lib/common";

/** Code as HTML with classes, undefined of a language that is not known. */
export function highlighted(code: string, language: string): string | undefined {
  return hljs.getLanguage(language) && hljs.highlight(code, { language, ignoreIllegals: true }).value;
}
