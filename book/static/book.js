// What scrolls sideways can be reached and scrolled by keyboard.
function markScrolling() {
  for (const part of document.querySelectorAll("pre, .table-wrapper, div.math, mjx-container")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  markScrolling();
  new ResizeObserver(markScrolling).observe(document.body);
  for (const folded of document.querySelectorAll("details"))
    folded.addEventListener("toggle", markScrolling);
});
