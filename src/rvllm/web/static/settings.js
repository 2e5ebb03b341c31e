// The settings beside the conversation: they are kept in the browser, and make a request's body.

import { byId } from "./dom.js";

const KEPT = "rvllm-settings";
const TEXTS = ["system", "stop", "schema", "tools"];
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

export function field(name) { return byId("parameters").elements[name]; }

export function startSettings() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem(KEPT)) || {}; } catch { /* none */ }
  for (const name of [...TEXTS, ...NUMBERS]) if (kept[name]) field(name).value = kept[name];
  field("logprobs").checked = Boolean(kept.logprobs);
  byId("extras").open = Boolean(kept.schema || kept.tools);
  for (const name of ["schema", "tools"]) check(name);
  byId("parameters").addEventListener("input", (event) => {
    if (event.target.name === "schema" || event.target.name === "tools") check(event.target.name);
    keep();
  });
}

function keep() {
  const kept = {};
  for (const name of [...TEXTS, ...NUMBERS]) kept[name] = field(name).value;
  kept.logprobs = field("logprobs").checked;
  try { localStorage.setItem(KEPT, JSON.stringify(kept)); } catch { /* storage is off */ }
}

// Says in the form what is wrong with a JSON text; the server says what is wrong with its content.
function check(name) {
  let wrong = "";
  try {
    const value = parsed(name);
    if (value !== null && name === "tools" && !Array.isArray(value)) wrong = "A list of tools is wanted: [ ... ]";
    else if (value !== null && typeof value !== "object") wrong = "A JSON object is wanted: { ... }";
  } catch (error) { wrong = `Not JSON: ${error.message}`; }
  field(name).setCustomValidity(wrong);
}

function parsed(name) {
  const text = field(name).value.trim();
  return text ? JSON.parse(text) : null;
}

// The body of a request about these messages. Lists of bare functions become tools.
export function bodyOf(messages) {
  const system = field("system").value.trim();
  const asked = { model: byId("model").value || byId("model").textContent,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages] };
  for (const name of NUMBERS) if (field(name).value !== "") asked[name] = Number(field(name).value);
  if (field("stop").value) asked.stop = [field("stop").value];
  if (field("logprobs").checked) { asked.logprobs = true; asked.top_logprobs = 5; }
  const schema = parsed("schema");
  if (schema) asked.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = parsed("tools");
  if (tools) asked.tools = tools.map((tool) => (tool.type ? tool : { type: "function", function: tool }));
  return asked;
}

// The same request for a terminal; the key stays out of it.
export function asCurl(body, keyed) {
  const data = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  const key = keyed ? ' \\\n  -H "Authorization: Bearer $RVLLM_API_KEY"' : "";
  return `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json'${key} \\\n  -d '${data}'`;
}
