// SPDX-License-Identifier: Apache-2.0
// What buttons do that need a script: copying a command. Everything else works without.
"use strict";
document.documentElement.classList.add("js");
document.addEventListener("click", function (event) {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const told = function (text) {
    const before = button.dataset.label || button.textContent;
    button.dataset.label = before;
    button.textContent = text;
    setTimeout(function () { button.textContent = before; }, 1500);
  };
  if (navigator.clipboard) {
    navigator.clipboard.writeText(button.dataset.copy).then(function () { told("Copied"); }, function () { told("No"); });
  } else {
    // Browsers offer the clipboard to secure addresses only; elsewhere the text is selected for Ctrl+C.
    const text = button.parentElement.querySelector("code");
    if (text) getSelection().selectAllChildren(text);
    told("Ctrl+C");
  }
});
