// SPDX-License-Identifier: Apache-2.0
// A growing log: new lines as they come, a fold per step. Without scripts the page reloads itself instead.
"use strict";
(function () {
  const box = document.getElementById("log");
  if (!box || !box.dataset.stream || !window.EventSource) return;
  const state = document.getElementById("state");
  const controls = /\x1b(?:\[[0-9;:?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])|[\x00-\x08\x0b-\x1f\x7f]/g;
  let target = box.querySelector("details:last-of-type pre");
  function step(title) {
    const fold = document.createElement("details");
    fold.className = "step";
    fold.open = true;
    const summary = document.createElement("summary");
    summary.textContent = title;
    target = document.createElement("pre");
    target.className = "log";
    fold.append(summary, target);
    box.append(fold);
  }
  const source = new EventSource(box.dataset.stream);
  source.onmessage = function (event) {
    const low = window.innerHeight + window.scrollY >= document.body.scrollHeight - 40;
    for (const raw of event.data.split("\n")) {
      const line = raw.split("\u240d").pop().replace(controls, "");
      if (line.startsWith("==> ")) { step(line.slice(4)); continue; }
      if (!target) step("Log");
      target.append(line + "\n");
    }
    if (low) window.scrollTo(0, document.body.scrollHeight);
  };
  source.addEventListener("state", function (event) {
    if (state) { state.textContent = event.data; state.className = "state " + event.data; }
    if (box.dataset.final.split(" ").includes(event.data)) { source.close(); location.reload(); }
  });
})();
