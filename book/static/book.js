// What scrolls sideways can be reached and scrolled by keyboard.
function markScrolling() {
  for (const part of document.querySelectorAll("pre, .table-wrapper, div.math, mjx-container")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}
// A click opens a figure in its own size: on a telephone it is shown smaller.
function linkFigures() {
  for (const image of document.querySelectorAll("article img")) {
    if (image.closest("a")) continue;
    const link = document.createElement("a");
    link.href = image.src;
    link.title = "Open the figure in its full size";
    image.replaceWith(link);
    link.append(image);
  }
}
// Printed sentences go on below; what stands in columns, line below line, keeps its
// lines, and so does code.
function wrapSentences() {
  for (const part of document.querySelectorAll(".cell_output .stream pre")) {
    const lines = part.innerText.split("\n").filter(line => /\S {2,}\S/.test(line));
    const gaps = lines.map(line => [...line.matchAll(/ {2,}(?=\S)/g)]
      .map(gap => gap.index + gap[0].length));
    const columns = gaps.some((ends, n) => n && ends.some(end => gaps[n - 1].includes(end)));
    const drawn = /[─│┌└═║]/.test(part.innerText);
    part.classList.toggle("sentences", !columns && !drawn);
  }
}
// What a search shows of a page has no words of the folds ("Show the solution").
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const plain = Search.htmlToText;
  const folds = /<p class="(collapsed|expanded) admonition-title">.*?<\/p>/gs;
  Search.htmlToText = (page, anchor) => plain(page.replace(folds, ""), anchor);
});
window.addEventListener("load", async () => {
  linkFigures();
  wrapSentences();
  await window.MathJax?.startup?.promise;
  markScrolling();
  new ResizeObserver(markScrolling).observe(document.body);
  for (const folded of document.querySelectorAll("details"))
    folded.addEventListener("toggle", markScrolling);
});
