/** What is asked of the model besides the messages, and how it reaches the server. */

/** Fields with numbers, by the server's names; null leaves the value to the server. */
export const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, help: "0 always takes the most probable token" },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, help: "Share of probability that is drawn from" },
  { name: "top_k", label: "Top-k", min: 0, max: 1000, step: 1, help: "Most probable tokens that are drawn from; 0 for all" },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, help: "Least probability, as a share of the greatest" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, help: "1 is none" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, help: "0 is none" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, help: "0 is none" },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 10_000_000, step: 1, help: "Longest answer" },
  { name: "seed", label: "Seed", min: 0, max: 4294967295, step: 1, help: "The same seed gives the same answer" },
] as const;

export type NumberName = (typeof NUMBERS)[number]["name"];

export const FORMATS = [
  { kind: "text", label: "Any text" },
  { kind: "json", label: "Any JSON object" },
  { kind: "schema", label: "JSON of a schema" },
  { kind: "regex", label: "Regular expression" },
] as const;

export type FormatKind = (typeof FORMATS)[number]["kind"];

export interface Settings extends Record<NumberName, number | null> {
  system: string;
  /** Texts that end an answer, one a line. */
  stop: string;
  format: FormatKind;
  schema: string;
  regex: string;
  /** A list of tools in JSON, "" for none. */
  tools: string;
  /** Whether probabilities of tokens are asked for. */
  probabilities: boolean;
}

const SCHEMA = `{
  "type": "object",
  "properties": {
    "answer": { "type": "string", "maxLength": 200 }
  },
  "required": ["answer"],
  "additionalProperties": false
}`;

export const DEFAULTS: Settings = {
  system: "",
  ...(Object.fromEntries(NUMBERS.map(({ name }) => [name, null])) as Record<NumberName, null>),
  stop: "",
  format: "text",
  schema: SCHEMA,
  regex: "(Yes|No)",
  tools: "",
  probabilities: false,
};

export const PRESETS: Record<string, Settings> = {
  Default: DEFAULTS,
  Precise: { ...DEFAULTS, temperature: 0 },
  Balanced: { ...DEFAULTS, temperature: 0.7, top_p: 0.95 },
  Creative: { ...DEFAULTS, temperature: 1.1, min_p: 0.05 },
};

/** Settings from a value that may come from anywhere: what it lacks or has wrong is the default. */
export function settingsOf(value: unknown): Settings {
  const given = (typeof value === "object" && value !== null ? value : {}) as Record<string, unknown>;
  const settings: Settings = { ...DEFAULTS };
  for (const name of ["system", "stop", "schema", "regex", "tools"] as const)
    if (typeof given[name] === "string") settings[name] = given[name];
  for (const { name } of NUMBERS)
    if (typeof given[name] === "number" && Number.isFinite(given[name])) settings[name] = given[name];
  if (FORMATS.some(({ kind }) => kind === given.format)) settings.format = given.format as FormatKind;
  settings.probabilities = given.probabilities === true;
  return settings;
}

function problem(text: string, fits: (value: unknown) => boolean, otherwise: string): string {
  try {
    return fits(JSON.parse(text)) ? "" : otherwise;
  } catch (error) {
    return `This is no JSON: ${(error as Error).message}`;
  }
}

/** What is wrong with a schema, "" if nothing that shows without compiling it. */
export const schemaProblem = (text: string): string =>
  problem(text, (value) => typeof value === "object" && value !== null && !Array.isArray(value), "A schema is a JSON object.");

/** What is wrong with a list of tools, "" if it has the shape of one. */
export const toolsProblem = (text: string): string =>
  text.trim() ? problem(text, Array.isArray, "Tools are a JSON list, in the shape of OpenAI's.") : "";

function responseFormat(settings: Settings): object | undefined {
  switch (settings.format) {
    case "text":
      return undefined;
    case "json":
      return { type: "json_object" };
    case "schema":
      return { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(settings.schema) } };
    case "regex":
      return { type: "grammar", syntax: "regex", definition: settings.regex };
  }
}

/** Tools of a chat, as a field of a request.
 *  @throws SyntaxError: they are no JSON. */
export const toolsOf = ({ tools }: Settings): object => (tools.trim() ? { tools: JSON.parse(tools) } : {});

/** Fields of a request, of chats and of completions alike.
 *  @throws SyntaxError: the schema is no JSON. */
export function fieldsOf(settings: Settings): Record<string, unknown> {
  const fields: Record<string, unknown> = {};
  for (const { name } of NUMBERS) if (settings[name] !== null) fields[name] = settings[name];
  const stop = settings.stop.split("\n").filter(Boolean);
  if (stop.length) fields.stop = stop;
  const format = responseFormat(settings);
  if (format) fields.response_format = format;
  return fields;
}
