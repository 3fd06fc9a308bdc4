"""A fixed English text for comparing models: prose, figures, quotes and code-like words."""

from __future__ import annotations

SAMPLE_TEXT = """\
Long before anybody measured a river in cubic metres, millers knew what it could do. They dug a channel beside it, a
little higher than the bed, and let a part of the water run along the hillside until there was enough of a drop to turn
a wheel. The channel was called the headrace. A wooden gate at its mouth decided how much came in; a second one let the
surplus go back to the river when the stones stood still. Nothing in the arrangement was clever by itself. What made it
work was that each piece did one thing, and that a child could see which gate was open.

In the spring of 1783 the mill at the upper bridge ground 240 sacks of wheat in nine days. "If the frost had lasted a
week longer," the miller wrote to his sister, "we would have eaten oats until May." He kept an account of every sack:
who brought it, what it weighed, how much flour and bran it gave, and whether it was paid for in coin, in labour or not
at all. Two hundred years later a student of economics found the book in an attic and typed its 3,112 lines into a
table. The first query took less than a second: select the name, sum the weight, group by year.

Why does a wheel turn more slowly when there is too much water? Because the tail of the channel fills up, and the
buckets have to push their way through what has not yet left. More pressure from above does not help; the remedy is a
wider way out. People who build pipelines of any kind, for grain, for parcels or for numbers, meet the same surprise
again: x arrives faster than y can carry it away, so z stands still, even though every meter says that it is busy. The
rule they write on the wall is short: look downstream first.
"""
