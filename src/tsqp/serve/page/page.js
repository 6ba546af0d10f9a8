"use strict";
// A chat with the server that this page came from. Answers are shown as text, never as HTML.

const KEY = "tsqp-api-key";
const STATUS_MS = 5000;
const VIEW_MS = 1000;
const WORDS = {
  pad: "One worker multiplies masked numbers. Each is uniformly random, so the worker learns " +
    "nothing of the conversation but its length and its times.",
  lattice: "One worker multiplies encrypted numbers, which look random to it, so it learns nothing " +
    "of the conversation but its length and its times.",
  shares: "Each of the workers receives one random share of every number. All shares together " +
    "would reveal the conversation. The image shows the share of the last worker.",
  open: "The worker receives every token and every hidden state in clear. It can read this " +
    "conversation.",
  tee: "There is no worker. Everything is computed by the trusted process itself, so nothing " +
    "leaves it.",
};

const $ = (id) => document.getElementById(id);
let messages = [];
let running = null; // the AbortController of the answer that is being written
let status = null;

function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch(path, { cache: "no-store", credentials: "omit", ...options, headers });
}

async function errorOf(response) {
  if (response.status === 401) askForKey();
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`The server answered with status ${response.status}.`);
  }
}

/* The API key */

function askForKey() {
  $("key-wrong").textContent = sessionStorage.getItem(KEY) ? "The key is wrong." : "";
  sessionStorage.removeItem(KEY);
  $("forget").hidden = true;
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  // A header must not have other characters, and no key has them.
  const key = $("key").value.replace(/[^\x20-\x7e]/g, "").trim();
  if (!key) return;
  sessionStorage.setItem(KEY, key);
  $("key").value = "";
  $("key-form").hidden = true;
  $("text").focus();
  showStatus();
});

$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  startAgain();
  showStatus();
});

/* The status */

async function showStatus() {
  let state;
  try {
    const response = await call("v1/tsqp/status");
    if (response.ok) {
      status = await response.json();
      state = status.status;
      $("key-form").hidden = true;
      $("forget").hidden = !sessionStorage.getItem(KEY);
      showFacts();
    } else if (response.status === 401) {
      askForKey();
      state = "needs a key";
    } else {
      state = response.status === 503 ? "loading" : `status ${response.status}`;
    }
  } catch {
    state = "not reachable";
  }
  $("state").textContent = state;
  $("state").classList.toggle("bad", state !== "ready");
}

function showFacts() {
  const inStock = status.pads_bytes === null ? null : bytes(status.pads_bytes);
  const facts = {
    "Privacy mode": status.field ? `${status.privacy}, field ${status.field}` : status.privacy,
    "Workers": workers(),
    "Transport": status.workers.length ? status.transport : null,
    "Masks in stock": inStock,
    "Wrong answers": status.integrity_failed
      ? "detected: nothing is offloaded any more"
      : status.integrity_failures || "none",
    "Reconnects": status.reconnects,
    "Running": `${status.running}, and ${status.waiting} waiting`,
    "Context": `${status.max_model_len} tokens`,
    "Attested by": status.attestation,
    "Warning": status.attestation_warning,
    "Version": status.version,
    "Model digest": status.model_digest,
  };
  const parts = [];
  for (const [name, value] of Object.entries(facts)) {
    if (value !== null) parts.push(element("dt", name), element("dd", String(value)));
  }
  $("facts").replaceChildren(...parts);
  $("model").textContent = $("model").title = status.model;
  let words = WORDS[status.privacy];
  if (status.field === "lattice") words = WORDS.lattice;
  if (status.field && status.workers.length && !status.worker_view) {
    words += " To see the numbers here, start the server with --show-worker-view.";
  }
  if ($("words").textContent !== words) $("words").textContent = words;
}

function workers() {
  const states = status.workers.map((each) => each.state);
  const known = ["in use", "standby", "lost", "quarantined"].filter((each) => states.includes(each));
  return known.map((each) => `${states.filter((one) => one === each).length} ${each}`).join(", ") || 0;
}

function bytes(number) {
  for (const unit of ["bytes", "KiB", "MiB"]) {
    if (number < 1024) return `${Math.round(number)} ${unit}`;
    number /= 1024;
  }
  return `${number.toFixed(1)} GiB`;
}

/* What the worker sees */

async function showView(requestId) {
  if (!requestId || !status || !status.worker_view) return;
  const response = await call(`v1/tsqp/view/${encodeURIComponent(requestId)}`);
  if (!response.ok) return;
  const view = await response.json();
  draw($("masked"), view.masked, view.columns);
  draw($("plain"), view.plain, view.columns);
  $("caption").textContent =
    `Input "${view.group}" of layer ${view.layer} in the last request: ${view.columns} values of ` +
    `each of the last ${view.rows} tokens. Each row is a token.`;
  $("views").hidden = false;
}

function draw(canvas, base64, columns) {
  const values = Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
  canvas.width = columns;
  canvas.height = 64;
  const image = new ImageData(columns, values.length / columns);
  values.forEach((value, place) => image.data.set([value, value, value, 255], 4 * place));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/* The conversation */

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function addMessage(role, text) {
  const message = element("div", "", `message ${role}`);
  const body = element("p", text);
  const note = element("div", "", "note");
  message.append(element("span", role === "user" ? "You: " : "Model: ", "unseen"), body, note);
  $("empty").hidden = true;
  $("log").append(message);
  $("log").scrollTop = $("log").scrollHeight;
  return { message, body, note };
}

function startAgain() {
  if (running) running.abort();
  messages = [];
  for (const each of document.querySelectorAll(".message")) each.remove();
  $("empty").hidden = false;
  $("views").hidden = true;
  $("text").focus();
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(conversation, { body, note }, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({
      messages: conversation, stream: true, stream_options: { include_usage: true },
    }),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  const requestId = response.headers.get("X-Request-Id");
  const timer = setInterval(() => showView(requestId).catch(() => {}), VIEW_MS);
  let began = 0;
  try {
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      const log = $("log");
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      for (const { delta, finish_reason: reason } of event.choices) {
        if (delta.content) {
          began ||= performance.now();
          body.append(delta.content);
        }
        if (reason === "length") note.textContent = "Ended at the maximum length. ";
      }
      if (event.usage) {
        const tokens = event.usage.completion_tokens;
        const rate = (tokens - 1) / ((performance.now() - began) / 1000);
        const speed = began && tokens > 1 ? `, ${rate.toFixed(1)} tokens a second` : "";
        note.append(`${tokens} ${tokens === 1 ? "token" : "tokens"}${speed}`);
      }
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } finally {
    clearInterval(timer);
    if (!signal.aborted) showView(requestId).catch(() => {});
  }
}

async function send(text) {
  const controller = (running = new AbortController());
  const conversation = messages;
  conversation.push({ role: "user", content: text });
  const asked = addMessage("user", text);
  const given = addMessage("assistant", "");
  given.message.classList.add("waiting");
  $("log").setAttribute("aria-busy", "true");
  $("send").hidden = true;
  $("stop").hidden = false;
  let ended = true;
  try {
    await answer(conversation, given, controller.signal);
  } catch (error) {
    ended = false;
    given.note.textContent = controller.signal.aborted ? "Stopped." : error.message;
    given.note.classList.toggle("bad", !controller.signal.aborted);
  }
  if (ended || given.body.textContent) {
    conversation.push({ role: "assistant", content: given.body.textContent });
  } else { // it may be sent again
    conversation.pop();
    asked.message.classList.add("failed");
    if (conversation === messages && !$("text").value) $("text").value = text;
  }
  given.message.classList.remove("waiting");
  if (running === controller) {
    running = null;
    $("log").removeAttribute("aria-busy");
    $("stop").hidden = true;
    $("send").hidden = false;
    $("text").focus();
  }
  $("log").scrollTop = $("log").scrollHeight;
  showStatus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  send(text);
});

$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});

$("stop").addEventListener("click", () => running && running.abort());
$("new").addEventListener("click", startAgain);

/* The panel is always open beside the chat, and closed at first above it. */
const wide = matchMedia("(min-width: 900px)");
function arrange() {
  $("worker").open = wide.matches;
  document.querySelector("summary").tabIndex = wide.matches ? -1 : 0;
}
wide.addEventListener("change", arrange);
arrange();

showStatus();
setInterval(() => {
  const waitsForKey = !$("key-form").hidden;
  if (!document.hidden && !waitsForKey) showStatus();
}, STATUS_MS);
$("text").focus();
