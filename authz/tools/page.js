"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const sections = [...document.querySelectorAll("section.port")];
  const why = document.getElementById("why");
  const words = {".": "allowed", "X": "blocked", "7": "allowed through L7", "-": "not judged"};
  const classes = {".": "", "X": "x", "7": "l", "-": "n"};
  const inside = data.workloads, all = data.names.length;

  // Reasons are stored as value, count, value, count, ...
  const runs = (list) => {
    const out = [];
    for (let i = 0; i < list.length; i += 2) for (let n = list[i + 1]; n > 0; n--) out.push(list[i]);
    return out;
  };
  const expanded = new Map();
  const reasons = (port) => {
    if (!expanded.has(port)) expanded.set(port, data.ports[port].why.map(runs));
    return expanded.get(port);
  };
  const reason = (port, view, index) => data.reasons[reasons(port)[view][index]] || "";

  const explain = (port, r, c) => {
    const out = [];
    const to = all - inside;
    if (r < inside && c < inside) {
      out.push(["Egress of " + data.names[r], reason(port, 1, r * inside + c) || "not judged here"]);
      out.push(["Ingress of " + data.names[c], reason(port, 0, r * inside + c) || "not judged here"]);
    } else if (c < inside) {
      out.push(["Ingress of " + data.names[c], reason(port, 2, (r - inside) * inside + c) || "not judged here"]);
    } else if (r < inside) {
      out.push(["Egress of " + data.names[r], reason(port, 3, r * to + c - inside) || "not judged here"]);
    }
    return out;
  };
  const place = (td) => [td.parentNode.rowIndex - 1, td.cellIndex - 1];
  const isCell = (td) => td && td.tagName === "TD" && !td.classList.contains("e") && td.closest("tbody");
  const portOf = (td) => sections.indexOf(td.closest("section"));

  let current = null;
  const show = (td) => {
    if (!isCell(td)) return;
    if (current) current.classList.remove("cur");
    current = td;
    td.classList.add("cur");
    const port = portOf(td), [r, c] = place(td);
    const list = document.createElement("dl");
    const line = (term, text) => {
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = term;
      dd.textContent = text;
      list.append(dt, dd);
    };
    line("Flow", data.names[r] + " \u2192 " + data.names[c] + " at " + data.ports[port].name + ": " + words[td.textContent]);
    for (const [term, text] of explain(port, r, c)) line(term, text);
    why.replaceChildren(list);
  };
  document.addEventListener("click", (e) => show(e.target.closest("td")));
  document.addEventListener("mouseover", (e) => {
    const td = e.target.closest && e.target.closest(".matrix td");
    if (!isCell(td) || td.title) return;
    const [r, c] = place(td);
    td.title = data.names[r] + " \u2192 " + data.names[c] + ": " + words[td.textContent] + "\n" +
      explain(portOf(td), r, c).map((x) => x.join(": ")).join("\n");
  });

  // Arrow keys move from cell to cell, over what is hidden.
  const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
  document.addEventListener("keydown", (e) => {
    const region = e.target.closest(".scroll");
    if (!region || !steps[e.key]) return;
    const rows = region.querySelector("tbody").rows;
    const start = current && region.contains(current) ? place(current) : null;
    let [r, c] = start || [0, 0];
    const [dr, dc] = start ? steps[e.key] : [0, 1];
    if (!start) c = -1;
    do {
      r += dr; c += dc;
    } while (rows[r] && rows[r].cells[c + 1] && c >= 0 && (rows[r].hidden || !isCell(rows[r].cells[c + 1]) || rows[r].cells[c + 1].hidden));
    if (!rows[r] || c < 0 || !rows[r].cells[c + 1]) return;
    e.preventDefault();
    show(rows[r].cells[c + 1]);
    rows[r].cells[c + 1].scrollIntoView({block: "nearest", inline: "nearest"});
  });

  // One port at a time.
  const buttons = [...document.querySelectorAll("button.port")];
  const choose = (i) => {
    sections.forEach((s, k) => { s.hidden = k !== i; });
    buttons.forEach((b, k) => b.setAttribute("aria-pressed", String(k === i)));
    apply(sections[i]);
  };
  buttons.forEach((b, i) => b.addEventListener("click", () => choose(i)));

  // The filter leaves rows and columns whose name has the text; the view says
  // whose policies count.
  const filter = document.getElementById("filter"), view = document.getElementById("view"), side = document.getElementById("side");
  const done = new Map(); // what each section shows
  const apply = (section) => {
    const port = sections.indexOf(section), want = filter.value.trim().toLowerCase();
    const state = JSON.stringify([want, view.value, side.value]);
    if (done.get(section) === state) return;
    done.set(section, state);
    const keep = data.names.map((n) => n.toLowerCase().includes(want));
    const row = (r) => side.value === "columns" || keep[r], column = (c) => side.value === "rows" || keep[c];
    const p = data.ports[port], table = section.querySelector("table");
    const to = (r, c) => view.value === "ingress" ? "-" : p.to[r][c - inside];
    const from = (r, c) => view.value === "egress" ? "-" : p.from[r - inside][c];
    for (const th of table.tHead.rows[0].cells) if (th.cellIndex > 0) th.hidden = !column(th.cellIndex - 1);
    for (const tr of table.tBodies[0].rows) {
      const r = tr.rowIndex - 1;
      tr.hidden = !row(r);
      if (tr.hidden) continue;
      for (let c = 0; c < all; c++) {
        const td = tr.cells[c + 1];
        td.hidden = !column(c);
        if (td.classList.contains("e")) continue;
        const ch = r >= inside ? from(r, c) : c >= inside ? to(r, c) : p[view.value][r][c];
        if (ch !== td.textContent) {
          td.textContent = ch;
          td.className = classes[ch];
          td.title = "";
        }
      }
    }
  };
  const applyShown = () => sections.forEach((s) => { if (!s.hidden) apply(s); });
  filter.addEventListener("input", applyShown);
  view.addEventListener("change", applyShown);
  side.addEventListener("change", applyShown);
  document.querySelectorAll(".controls").forEach((x) => { x.hidden = false; });
  why.hidden = false;
  choose(0);
})();
