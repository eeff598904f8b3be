"""Common English words that are one token each, with a leading space, in SmolLM2's vocabulary (and in most others)."""

from __future__ import annotations

_TEXT = """
about above across action after again against air almost along already also always among animal answer area around
arrive author back balance basic beach because become before begin behind being below best better between beyond big
bird black blue board boat body book both bottom box branch bread break bridge bright bring brother brown build
business call camp car care carry case cat catch cause center chance change chapter check child choice church circle
city class clean clear climb clock close cloud coast cold color come common company corner cost cotton count country
course cover create cross crowd culture current dark daughter day deal death decide deep desert design desk detail
difference dinner direction distance doctor dog door double down draw dream dress drive dry early earth east easy
eat edge education effect effort eight electric energy engine enough enter evening event every example eye face fact
fall family farm fast father field figure fill final find fire fish five flat floor flow flower follow food foot
force forest form forward four free fresh friend front fruit full future game garden general give glass gold good
government grass great green ground group grow hand happen hard head health hear heart heat heavy help high hill
history hold home horse hot hour house human hundred ice idea important inside interest iron island issue join
journey jump just keep key kind king kitchen know lake land language large last late laugh law lead leaf learn leave
left letter level library life light line list listen little local long look low machine main make many map mark
market matter meal mean measure meat member metal method middle mile milk mind minute model moment money month moon
morning mother mountain mouth move music name nation nature near night noise north note nothing number object ocean
office oil old open order other over page paint paper parent park part party pass past path pattern people perfect
period person phone picture piece place plain plan plant play point poor position power present press problem
process produce program proper public pull question quick quiet quite race radio rain raise rather reach read ready
reason record red region remember report rest rich ride right ring rise river road rock room root round rule run
safe salt same sand school science sea season seat second seed seem sell sense serve seven shape share sharp ship
shop short show side sign silver simple single sister size skin sky sleep slow small smile snow social soft soil
song sound south space special speed spring square stage stand star start state station step stone store story
strange stream street strong study summer sun supply surface sweet system table talk tall teacher team tell test
thing think thousand time today together tool top total touch town track trade train travel tree trip trouble truth
turn under unit use valley value view village visit voice wait walk wall war warm watch water wave way wear weather
week weight west wheel white whole wide wife wild wind window winter wish woman wonder wood word work world write
year yellow young
"""
WORDS: tuple[str, ...] = tuple(_TEXT.split())
