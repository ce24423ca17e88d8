// What pymdownx.arithmatex marks as mathematics, and nothing else.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], tags: "none" },
  chtml: { scale: 0.95, displayAlign: "left", displayIndent: "0em" },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex", enableMenu: false },
};
