// Tabs, the connection, and the stream of states that feeds the engine view while it is looked at.

import { events, key, request, setKey } from "./api.js";
import { startChat } from "./chat.js";
import { byId, el, setText } from "./dom.js";
import { EngineView } from "./engine.js";

const VIEWS = ["chat", "engine"];
const RETRY = 2000;
const engine = new EngineView(byId("engine"));
let watching = null;  // AbortController of the stream of states

function status(state, word) {
  byId("status").dataset.state = state;
  setText(byId("status").querySelector(".word"), word);
}

function open(view, focus = false) {
  for (const name of VIEWS) {
    const tab = byId(`tab-${name}`);
    const chosen = name === view;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    byId(name).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  if (location.hash !== `#${view}`) history.replaceState(null, "", `#${view}`);
  watchWhileSeen();
}

const viewOfHash = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");

// Nothing is asked of the engine unless its view is open in a tab that can be seen.
function watchWhileSeen() {
  const wanted = !byId("engine").hidden && !document.hidden;
  if (wanted && !watching) watch();
  if (!wanted && watching) { watching.abort(); watching = null; }
}

async function watch() {
  const mine = (watching = new AbortController());
  while (!mine.signal.aborted) {
    try {
      const response = await request("/rvllm/state?interval=0.5",
        { headers: { Accept: "text/event-stream" }, signal: mine.signal });
      status("good", "live");
      for await (const state of events(response)) engine.show(state);
      if (!mine.signal.aborted) status("bad", "ended");
    } catch (error) {
      if (mine.signal.aborted) return;
      failed(error);
      if (error.status === 401) { watching = null; return; }
    }
    engine.pause();
    await new Promise((resume) => { setTimeout(resume, RETRY); });
  }
}

function failed(error) {
  if (error.status === 401) { status("bad", "key needed"); askKey(); }
  else if (error.status) status("bad", error.status === 503 ? "not serving" : "error");
  else status("bad", "not reachable");
}

function askKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  byId("key").value = key();
  dialog.showModal();
}

// One model is a name; of several, which take turns on the device, the next answer's is chosen.
function showModels(names) {
  const chosen = names.includes(byId("model").value) ? byId("model").value : names[0];
  const title = () => { document.title = `${byId("model").value || names[0]} · rvLLM`; };
  if (names.length > 1) {
    const entries = names.map((name) => el("option", { selected: name === chosen }, name));
    byId("model").replaceWith(el("select", { id: "model", class: "model", onchange: title,
      "aria-label": "Model", title: "The model that answers next" }, ...entries));
  } else setText(byId("model"), names[0]);
  title();
}

async function connect() {
  try {
    const models = await (await request("/v1/models")).json();
    showModels(models.data.map((model) => model.id));
    status("good", "ready");
    byId("prompt").focus({ preventScroll: true });
  } catch (error) { failed(error); }
}

byId("key-dialog").addEventListener("close", (event) => {
  if (event.target.returnValue !== "ok") return;
  setKey(byId("key").value);
  connect();
  watchWhileSeen();
});
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close("cancel"));
byId("status").addEventListener("click", askKey);
for (const name of VIEWS) byId(`tab-${name}`).addEventListener("click", () => open(name));
document.querySelector("nav").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
  event.preventDefault();
  open(VIEWS[1 - VIEWS.indexOf(viewOfHash())], true);
});
document.addEventListener("visibilitychange", watchWhileSeen);
addEventListener("hashchange", () => open(viewOfHash()));
startChat(failed);
open(viewOfHash());
connect();
