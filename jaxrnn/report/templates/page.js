'use strict';
// Bokeh draws on a canvas, which has no style sheet: axes and titles get the page's colours.
function paint() {
  const style = getComputedStyle(document.documentElement);
  const [text, faint, line] = ['--text', '--faint', '--line'].map((name) => style.getPropertyValue(name).trim());
  for (const drawn of window.Bokeh ? Bokeh.documents : []) {
    for (const model of drawn.all_models) {
      if (model.type.endsWith('Axis')) {
        model.setv({
          axis_label_text_color: text, major_label_text_color: text,
          axis_line_color: faint, major_tick_line_color: faint, minor_tick_line_color: null,
        });
      } else if (model.type === 'Grid') {
        model.setv({grid_line_color: line});
      } else if (model.type === 'Title') {
        model.setv({text_color: text});
      } else if (model.type === 'Legend') {
        model.setv({label_text_color: text});
      } else if (model.type === 'ColorBar') {
        model.setv({major_label_text_color: text});
      }
    }
  }
}
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', paint);
// Bokeh adds its documents when the page is loaded, a little later than it says so.
let looks = 0;
function paintWhenDrawn() {
  if (window.Bokeh && Bokeh.documents.length) paint();
  else if (++looks < 600) requestAnimationFrame(paintWhenDrawn);
}
paintWhenDrawn();

document.getElementById('copy')?.addEventListener('click', async (event) => {
  const button = event.currentTarget, command = document.getElementById('command');
  try {
    await navigator.clipboard.writeText(command.textContent);
  } catch {  // where a page may not
    const range = document.createRange();
    range.selectNodeContents(command);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand('copy');
  }
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 2000);
});
