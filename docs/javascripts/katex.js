const delimiters = [
  { left: "$$", right: "$$", display: true },
  { left: "\\(", right: "\\)", display: false },
  { left: "\\[", right: "\\]", display: true },
];
const inNotebooks = [...delimiters, { left: "$", right: "$", display: false }];

document$.subscribe(({ body }) => {
  if (typeof renderMathInElement === "undefined") return; // without a network
  for (const cell of body.querySelectorAll(".jp-RenderedMarkdown"))
    renderMathInElement(cell, { delimiters: inNotebooks });
  renderMathInElement(body, { delimiters });
});
