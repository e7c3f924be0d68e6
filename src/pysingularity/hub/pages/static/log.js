// SPDX-License-Identifier: Apache-2.0
// A growing log: new lines as they come, coloured, a fold per step. Without scripts the page reloads itself instead.
// What a line looks like is decided as in text.py; nothing is ever put into the page as markup.
"use strict";
(function () {
  const box = document.getElementById("log");
  if (!box || !box.dataset.stream || !window.EventSource) return;
  const state = document.getElementById("state");
  const names = ["black", "red", "green", "yellow", "blue", "magenta", "cyan", "white"];
  const sequence = /\x1b(?:\[([0-9;:?]*)[ -/]*([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])/g;
  const control = /[\x00-\x08\x0b-\x1f\x7f]/g;
  let fold = box.querySelector("details:last-of-type");
  let target = fold && fold.querySelector("pre");
  let styles = [];

  function step(title) {
    if (fold) fold.open = false;
    fold = document.createElement("details");
    fold.className = "step";
    fold.open = true;
    const summary = document.createElement("summary");
    summary.textContent = title;
    target = document.createElement("pre");
    target.className = "log";
    target.tabIndex = 0;
    target.setAttribute("aria-label", title);
    fold.append(summary, target);
    box.append(fold);
    styles = [];
  }

  function render(codes) {
    const numbers = codes.replace(/:/g, ";").split(";").map(Number);
    const without = function (prefix) { return styles.filter(function (one) { return !one.startsWith(prefix); }); };
    for (let at = 0; at < numbers.length; at += 1) {
      const code = numbers[at];
      if (code === 0) styles = [];
      else if (code >= 1 && code <= 4) styles = styles.concat(["", "bold", "dim", "italic", "underline"][code]);
      else if (code === 22) styles = styles.filter(function (one) { return one !== "bold" && one !== "dim"; });
      else if (code === 23) styles = without("italic");
      else if (code === 24) styles = without("underline");
      else if ((code >= 30 && code <= 37) || (code >= 90 && code <= 97)) styles = without("fg-").concat("fg-" + names[code % 10]);
      else if ((code >= 40 && code <= 47) || (code >= 100 && code <= 107)) styles = without("bg-").concat("bg-" + names[code % 10]);
      else if (code === 39) styles = without("fg-");
      else if (code === 49) styles = without("bg-");
      else if (code === 38 || code === 48) at += numbers[at + 1] === 2 ? 4 : 2;
    }
  }

  function line(text) {
    const out = document.createDocumentFragment();
    const piece = function (part) {
      part = part.replace(control, "");
      if (!part) return;
      if (!styles.length) { out.append(part); return; }
      const span = document.createElement("span");
      span.className = styles.join(" ");
      span.textContent = part;
      out.append(span);
    };
    let at = 0;
    for (const match of text.matchAll(sequence)) {
      piece(text.slice(at, match.index));
      at = match.index + match[0].length;
      if (match[2] === "m") render(match[1] || "0");
    }
    piece(text.slice(at));
    out.append("\n");
    return out;
  }

  const source = new EventSource(box.dataset.stream);
  source.onmessage = function (event) {
    const waiting = document.getElementById("waiting");
    if (waiting) waiting.remove();
    const low = window.innerHeight + window.scrollY >= document.body.scrollHeight - 120;
    const inner = !target || target.scrollTop + target.clientHeight >= target.scrollHeight - 40;
    for (const raw of event.data.split("\n")) {
      const text = raw.split("\u240d").pop();
      if (text.startsWith("==> ")) { step(text.slice(4)); continue; }
      if (!target) step("Log");
      target.append(line(text));
    }
    if (inner && target) target.scrollTop = target.scrollHeight;
    if (low) window.scrollTo(0, document.body.scrollHeight);
  };
  source.addEventListener("state", function (event) {
    if (state) { state.textContent = event.data.replace("_", " "); state.className = "state " + event.data; }
    // The finished page has the buttons, the time it took and the image: it is loaded once more.
    if (box.dataset.final.split(" ").includes(event.data)) { source.close(); location.reload(); }
  });
})();
