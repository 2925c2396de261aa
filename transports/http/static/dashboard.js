// The dashboard: reads /api/services, then keeps up by /api/events. Every text goes in as textContent; nothing is parsed
// as markup. The events come over fetch, because EventSource can send no API key.

const CAPABILITIES = ["text-generation", "embeddings", "reasoning", "tool-calling", "grammar-constrained"];
const RELOAD_MS = 5000, RETRY_MS = 2000, LINES = 200, KEY = "infsvc-api-key", THEME = "infsvc-theme";

const $ = (id) => document.getElementById(id);
const services = new Map();
const cards = new Map();
let heard = 0, here = "";

const id = (model, node) => JSON.stringify([model, node]);
const made = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
};
const set = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const stated = (element, state) => { if (element.dataset.state !== state) element.dataset.state = state; };

class NeedsKey extends Error {}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (response.status === 401) throw new NeedsKey();
  if (!response.ok) throw new Error(`${path} answered ${response.status}`);
  return response;
}

function askForKey() {
  const wrong = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  connection("bad", "an API key is needed");
  if (wrong) set($("key-text"), "The node does not know that key. Try another one.");
  $("key-form").hidden = false;
  $("key").focus();
  return new Promise((resolve) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, $("key").value);
      $("key").value = "";
      $("key-form").hidden = true;
      resolve();
    };
  });
}

function connection(state, text) {
  stated($("connection"), state);
  set($("connection-text"), text);
}

const STATES = { online: "good", loading: "warn", draining: "warn", failed: "bad", offline: "idle" };
const LEVELS = { healthy: "good", warning: "warn", critical: "bad" };

const ago = (iso) => {
  const seconds = (Date.now() - Date.parse(iso)) / 1000;
  return Number.isFinite(seconds) ? `${span(Math.max(0, seconds))} ago` : "–";
};
const span = (seconds) => {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
};
const milliseconds = (value) => (typeof value === "number" ? `${value < 10 ? value.toFixed(2) : Math.round(value)} ms` : "–");
const number = (value) => (typeof value === "number" ? value.toLocaleString("en") : "–");

const OF_LOAD = ["slots", "tok/s", "warns from"];

function facts(service) {
  const info = service.model_info || {}, queue = service.queue_metrics;
  return [
    ["architecture", info.architecture || "–"],
    ["parameters", info.parameter_count || "–"],
    ["quantisation", info.quantization || "–"],
    ["context", info.context_size ? `${number(info.context_size)} tokens` : "–"],
    ["slots", number(service.worker_count)],
    ["tok/s", typeof service.tokens_per_s === "number" ? service.tokens_per_s.toFixed(1) : "–"],
    ["response time", milliseconds(service.response_time_ms)],
    ["processed", number(queue.total_processed)],
    ["last request", service.last_activity ? ago(service.last_activity) : "–"],
    ["last seen", service.local ? "this node" : ago(service.last_seen)],
    ["uptime", service.uptime ? span(service.uptime / 1e9) : "–"],
    ["warns from", service.backpressure_status.threshold ? `${number(service.backpressure_status.threshold)} waiting` : "–"],
  ];
}

function pairs(list, entries) {
  while (list.children.length > entries.length) list.lastElementChild.remove();
  entries.forEach(([name, value], index) => {
    let row = list.children[index];
    if (!row) {
      row = made("div");
      row.append(made("dt"), made("dd"));
      list.append(row);
    }
    set(row.children[0], name);
    set(row.children[1], value);
  });
}

function show(service) {
  const key = id(service.model_name, service.node);
  let card = cards.get(key);
  if (!card) {
    card = $("card").content.firstElementChild.cloneNode(true);
    cards.set(key, card);
    const before = [...cards].filter(([other]) => order(other) > order(key)).sort((a, b) => (order(a[0]) < order(b[0]) ? -1 : 1))[0];
    $("cards").insertBefore(card, before ? before[1] : null);
  }
  const part = (selector) => card.querySelector(selector);
  set(part(".name"), service.model_name);
  set(part(".node"), `@${service.node}`);
  stated(part(".state"), STATES[service.status] || "idle");
  const progress = typeof service.progress === "number" ? ` ${Math.round(service.progress * 100)} %` : "";
  set(part(".state .word"), service.status + progress);
  part(".reason").hidden = !service.reason;
  set(part(".reason"), service.reason || "");
  const list = part(".capabilities");
  if (!list.children.length) CAPABILITIES.forEach((name) => { const item = made("li"); item.dataset.name = name; list.append(item); });
  for (const item of list.children) {
    const present = service.capabilities.includes(item.dataset.name);
    item.dataset.present = present;
    set(item, `${present ? "✓" : "·"} ${item.dataset.name}`);
    const claim = (service.claims || []).find((each) => each.capability === item.dataset.name);
    item.setAttribute("aria-label", `${item.dataset.name}: ${present ? "yes" : "no"}`);
    if (claim) item.title = claim.evidence;
  }
  const queue = service.queue_metrics, pressure = service.backpressure_status;
  // What does not run has no load to be healthy under.
  const rests = (service.status === "failed" || service.status === "offline") && !queue.pending_messages;
  part(".queue").hidden = rests;
  stated(part(".level"), LEVELS[pressure.level] || "idle");
  set(part(".level .word"), pressure.level);
  part("meter").value = pressure.utilization;
  part("meter").title = `${(pressure.utilization * 100).toFixed(1)} % of the queue`;
  set(part(".depth"), `${number(queue.pending_messages)} of ${number(queue.queue_capacity)} waiting · ${number(queue.active_processing)} active · ${(pressure.utilization * 100).toFixed(1)} %`);
  pairs(part(".facts"), facts(service).filter(([name, value]) => !rests || (value !== "–" && !OF_LOAD.includes(name))));
  pairs(part(".doors"), [["HTTP", service.endpoint || "–"], ["NATS", service.nats_topic || "–"]]);
  match(key);
}

const order = (key) => { const [model, node] = JSON.parse(key); return `${node === here ? 0 : 1}${model}\u0000${node}`; };

function match(key) {
  const service = services.get(key), card = cards.get(key);
  const text = [service.model_name, `@${service.node}`, service.status, service.backpressure_status.level,
    (service.model_info || {}).architecture, ...service.capabilities].join(" ").toLowerCase();
  card.hidden = !$("filter").value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function matrix() {
  const body = $("matrix").tBodies[0], keys = [...services.keys()].sort((a, b) => (order(a) < order(b) ? -1 : 1));
  while (body.rows.length > keys.length) body.lastElementChild.remove();
  keys.forEach((key, index) => {
    const service = services.get(key);
    let row = body.rows[index];
    if (!row) {
      row = made("tr");
      const name = made("th");
      name.scope = "row";
      row.append(name, ...CAPABILITIES.map(() => made("td")));
      body.append(row);
    }
    set(row.cells[0], `${service.model_name} @${service.node}`);
    CAPABILITIES.forEach((name, column) => {
      const present = service.capabilities.includes(name), cell = row.cells[column + 1];
      cell.dataset.present = present;
      set(cell, present ? "✓" : "·");
      cell.setAttribute("aria-label", `${name}: ${present ? "yes" : "no"}`);
    });
  });
}

function totals() {
  matrix();
  const all = [...services.values()], online = all.filter((each) => each.status === "online");
  const sum = (get) => all.reduce((total, each) => total + (get(each) || 0), 0);
  set($("n-nodes"), String(new Set(all.filter((each) => each.local || each.status !== "offline").map((each) => each.node)).size));
  set($("n-up"), `${online.length}/${all.length}`);
  set($("rate"), sum((each) => each.tokens_per_s).toFixed(0));
  set($("waiting"), number(sum((each) => each.queue_metrics.pending_messages)));
  set($("active"), number(sum((each) => each.queue_metrics.active_processing)));
  const shown = [...cards.values()].some((card) => !card.hidden);
  $("empty").hidden = shown;
  set($("empty"), all.length ? "No model matches the filter." : "No model is known here. Add a worker file under envs/ and load it.");
}

function dead(count) {
  $("dead").hidden = !count;
  const said = count === 1 ? "1 request could not be answered" : `${number(count)} requests could not be answered`;
  set($("dead"), count ? `✕ ${said} and ${count === 1 ? "is" : "are"} kept as dead letters: infsvc queue dead, screen Queue in the app, or GET /api/dead` : "");
}

async function load() {
  const began = heard, body = await (await ask("/api/services")).json();
  const keys = new Set();
  here = (body.services.find((each) => each.local) || { node: here }).node;
  for (const service of body.services) {
    const key = id(service.model_name, service.node);
    keys.add(key);
    services.set(key, service);
  }
  for (const key of [...services.keys()].filter((each) => !keys.has(each))) {
    services.delete(key);
    cards.get(key)?.remove();
    cards.delete(key);
  }
  for (const service of services.values()) show(service);
  totals();
  // A node without a broker, or one whose broker keeps nothing, has none to tell of.
  try { dead((await (await ask("/api/dead?limit=1")).json()).total); } catch (error) { if (error instanceof NeedsKey) throw error; dead(0); }
  return heard === began;
}

function line(event) {
  const state = event.type === "alert" || event.level === "error" ? "bad" : event.level === "warning" ? "warn" : "";
  const item = made("li"), time = made("time", new Date(event.ts * 1000).toLocaleTimeString("en-GB"));
  const text = made("span", said(event), "text");
  if (state) text.dataset.state = state;
  item.append(time, made("span", event.model ? `${event.model} @${event.node}` : `@${event.node}`), text);
  $("log").hidden = false;
  $("log-empty").hidden = true;
  $("log").prepend(item);
  while ($("log").children.length > LINES) $("log").lastElementChild.remove();
}

function said(event) {
  switch (event.type) {
    case "model.state": return `is ${event.state.replace("_", " ")}${event.reason ? `: ${event.reason}` : ""}`;
    case "request.finished": return `${event.req_id}: ${event.finish_reason}, ${event.tokens_in} in, ${event.tokens_out} out, ${Math.round(event.duration_ms)} ms`;
    case "broker.state": return `broker ${event.state}${event.reason ? `: ${event.reason}` : ""}`;
    case "log": case "alert": return event.msg;
    default: return event.type;
  }
}

function take(event) {
  heard += 1;
  const key = id(event.model ?? "", event.node), service = services.get(key);
  if (event.type === "service.health") {
    services.set(key, { ...(service || { local: event.node === here }), ...event.document });
    services.get(key).last_seen ??= new Date(event.ts * 1000).toISOString();
    show(services.get(key));
    totals();
  } else if (event.type === "queue.report" && service) {
    const report = event.report;
    Object.assign(service.queue_metrics, {
      pending_messages: report.pending_messages, active_processing: report.active_processing, queue_capacity: report.queue_capacity,
    });
    Object.assign(service.backpressure_status, { level: report.status, utilization: report.pending_messages / Math.max(1, report.queue_capacity) });
    Object.assign(service, { tokens_per_s: report.tokens_per_s, last_seen: new Date(event.ts * 1000).toISOString() });
    show(service);
    totals();
  } else if (event.type === "queue.dead") {
    dead(event.n_kept);
  } else if (event.type === "model.progress" && service && event.total_bytes) {
    service.progress = event.done_bytes / event.total_bytes;
    show(service);
  }
  if (["model.state", "request.finished", "broker.state", "alert"].includes(event.type) || (event.type === "log" && ["warning", "error"].includes(event.level))) line(event);
}

async function follow() {
  const reader = (await ask("/api/events")).body.pipeThrough(new TextDecoderStream()).getReader();
  await load();
  connection("good", "live");
  const timer = setInterval(() => { load().catch(() => {}); }, RELOAD_MS);
  try {
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const frames = (rest + value).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        const data = frame.split("\n").find((each) => each.startsWith("data: "));
        if (data) take(JSON.parse(data.slice(6)));
      }
    }
  } finally {
    clearInterval(timer);
    reader.cancel().catch(() => {});
  }
}

function theme(choice) {
  if (choice === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  set($("theme"), `theme: ${choice}`);
  localStorage.setItem(THEME, choice);
}

const themes = ["auto", "dark", "light"];
theme(themes.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto");
$("theme").addEventListener("click", () => theme(themes[(themes.indexOf(localStorage.getItem(THEME)) + 1) % themes.length]));
$("filter").addEventListener("input", () => { for (const key of cards.keys()) match(key); totals(); });

for (;;) {
  try {
    await follow();
    connection("warn", "the node ended the connection; trying again");
  } catch (error) {
    if (error instanceof NeedsKey) { await askForKey(); continue; }
    connection("bad", "no connection to the node; trying again");
  }
  await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
}
