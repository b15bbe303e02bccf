// The page of a run that still trains: it is loaded again when the run has gone on, and looks as it did.
const LOOK_EVERY = 3000, KEPT = 'jaxrnn';
function zoomed() {
  return window.Bokeh && Bokeh.documents.length ? Bokeh.documents[0].roots()[0].x_range : null;
}
let begun = null;  // the range before anybody looked closer
function restore() {
  const range = zoomed();
  if (!range && ++restore.looks < 600) return requestAnimationFrame(restore);
  if (range) begun = [range.start, range.end];
  const kept = JSON.parse(sessionStorage.getItem(KEPT) || 'null');
  sessionStorage.removeItem(KEPT);
  if (!kept) return;
  if (range && kept.range) range.setv({start: kept.range[0], end: kept.range[1]});
  scrollBack(kept, 0);
}
function scrollBack(kept, looks) {  // once all is drawn, and the page as long as it was
  if (document.documentElement.scrollHeight >= kept.height || looks > 300) scrollTo(0, kept.scroll);
  else requestAnimationFrame(() => scrollBack(kept, looks + 1));
}
restore.looks = 0;
restore();
setInterval(async () => {
  try {
    if (await (await fetch('stamp')).text() === LIVE) return;
  } catch {  // nobody serves it any more
    return;
  }
  const range = zoomed();
  const moved = range && begun && (range.start !== begun[0] || range.end !== begun[1]);
  const kept = {scroll: scrollY, height: document.documentElement.scrollHeight, range: moved ? [range.start, range.end] : null};
  sessionStorage.setItem(KEPT, JSON.stringify(kept));
  location.reload();
}, LOOK_EVERY);
