"""The words of questions, captions and closed answers; words that are only shown in images are not among them."""

_WORDS = """
user assistant system what which where how who is are do does did can you see the a an and or of in on at to it this
that these those there here not no yes one two three four five six seven eight nine ten zero many much more most less
fewer fewest least than as same different both all any some other another with without from for by between describe
caption image picture pictures photo photos photograph shown show shows say says written read reads look like please
tell me give name answer question find about color colour colors colours shape shapes size large larger largest small
smaller smallest big bigger biggest tiny object objects thing things left right above below top bottom up down center
middle corner half side row rows column columns position located next near chart charts graph bar bars line lines pie
point points slice slices title titled kind type value values number numbers high higher highest low lower lowest
maximum minimum has have trend go goes rise fall increase decrease percent word words text letter letters digit digits
first second third fourth last sign receipt menu bill shop item items price cost costs cheap cheapest expensive total
together sum table cell page animal animals vehicle vehicles mosaic
"""
LANGUAGE: dict[str, None] = dict.fromkeys(_WORDS.split())  # ordered, and quick to look up
