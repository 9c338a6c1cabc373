"""How the page looks."""

STYLE = """
:root {
  --paper: #ffffff; --raised: #f4f6f9; --ink: #1d2128; --soft: #565e6b; --rule: #d5dae1; --link: #0b5fa5;
  --good: #1d6b2c; --warn: #8a4b00; --bad: #a92314; --calm: #0b5fa5; --mark: #ffe3d9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #171a20; --raised: #20242c; --ink: #e8eaee; --soft: #aab2bf; --rule: #3a414d; --link: #7fbdf5;
    --good: #7bcf86; --warn: #f0b45c; --bad: #ff8a75; --calm: #7fbdf5; --mark: #5a2a20;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
header, main { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.25rem; }
header p { margin: 0; color: var(--soft); }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 1.6rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: .5rem 0 0; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.verdict { font-size: 1.15rem; background: var(--raised); border-left: .3rem solid var(--rule); padding: .8rem 1rem;
  margin: .5rem 0; }
.verdicts { list-style: none; padding: 0; margin: 0; }
.verdicts li { padding: .5rem 0; border-top: 1px solid var(--rule); }
.badge { font-weight: 700; white-space: nowrap; border: 2px solid currentColor; border-radius: .4rem;
  padding: .05rem .5rem; margin-right: .3rem; font-size: .95rem; }
.badge.stable { color: var(--good); } .badge.inflating { color: var(--warn); } .badge.collapsed { color: var(--bad); }
.badge.recovered { color: var(--calm); } .badge.too { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(10rem, 22%), 1fr)); gap: .6rem;
  margin: 0; }
.cards div { background: var(--raised); border-radius: .4rem; padding: .5rem .8rem; }
.cards dt { font-weight: 400; font-size: .85rem; color: var(--soft); }
.cards dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-top: 1px solid var(--rule); vertical-align: top;
  font-weight: 400; }
thead th { font-weight: 600; border-top: 0; vertical-align: bottom; }
tbody th { overflow-wrap: anywhere; min-width: 12rem; }
td { white-space: nowrap; } td code { white-space: normal; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
details { border-top: 1px solid var(--rule); padding: .4rem 0; }
summary { cursor: pointer; font-weight: 600; }
summary small { font-weight: 400; color: var(--soft); }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  padding: 0; list-style: none; }
.answers li { background: var(--raised); border-radius: .4rem; padding: .7rem .9rem; min-width: 0; }
.answers p { margin: 0 0 .2rem; }
.label { color: var(--soft); font-size: .85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; max-height: 16rem; margin: 0 0 .6rem;
  font: .85rem/1.45 ui-monospace, monospace; }
details > pre { max-height: 40rem; background: var(--raised); padding: .8rem; margin-top: .5rem; }
mark { background: var(--mark); color: inherit; text-decoration: underline dotted; text-underline-offset: .2em; }
.turn { font-family: system-ui, sans-serif; font-size: .75rem; font-weight: 700; color: var(--bad);
  border: 1px solid currentColor; border-radius: .3rem; padding: 0 .3rem; margin: 0 .2rem; white-space: nowrap;
  user-select: none; }
.tag { font-size: .85rem; border: 1px solid currentColor; border-radius: .3rem; padding: 0 .35rem; margin-left: .3rem; }
.tag.right { color: var(--good); } .tag.wrong, .tag.truncated, .tag.repetitive { color: var(--bad); }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; }
@media print { .plots { grid-template-columns: 1fr 1fr; } }
"""
