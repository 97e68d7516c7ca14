# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""English names for the contents of the photographs."""

from __future__ import annotations


MSRC_VOID = ("horse", "mountain")  # too rare; by convention unlabelled
MSRC_CLASSES = (
    "building grass tree cow horse sheep sky mountain aeroplane water face car bicycle flower sign bird book chair road "
    "cat dog body boat"
).split()
MSRC_NAMES = [name for name in MSRC_CLASSES if name not in MSRC_VOID]

# Synonyms of class names in captions.
SYNONYMS = {
    "aeroplane": ("airplane", "plane", "aircraft"),
    "airplane": ("aeroplane", "plane", "aircraft"),
    "body": ("person", "people", "human body"),
    "person": ("people", "man", "woman"),
    "face": ("human face", "head"),
    "road": ("street",),
    "bicycle": ("bike",),
    "motorcycle": ("motorbike",),
    "building": ("house", "buildings"),
    "grass": ("lawn", "meadow", "green grass"),
    "tree": ("trees",),
    "sky": ("blue sky", "clouds"),
    "water": ("lake", "river"),
    "car": ("automobile",),
    "sign": ("signboard",),
    "flower": ("flowers", "blossom"),
    "book": ("books",),
    "boat": ("ship",),
    "cow": ("cattle",),
    "couch": ("sofa",),
    "tv": ("television",),
    "cell phone": ("mobile phone",),
}

# COCO panoptic (Kirillov et al., 2019; Caesar et al., 2018): category id and natural name.
_COCO = """1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat, 10 traffic light,
11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow,
22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee,
35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard,
43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple,
54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair, 63 couch,
64 potted plant, 65 bed, 67 dining table, 70 toilet, 72 tv, 73 laptop, 74 computer mouse, 75 remote control,
76 keyboard, 77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 84 book, 85 clock, 86 vase,
87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush, 92 banner, 93 blanket, 95 bridge, 100 cardboard,
107 counter, 109 curtain, 112 door, 118 wood floor, 119 flower, 122 fruit, 125 gravel, 128 house, 130 light,
133 mirror, 138 net, 141 pillow, 144 platform, 145 playing field, 147 railroad, 148 river, 149 road, 151 roof,
154 sand, 155 sea, 156 shelf, 159 snow, 161 stairs, 166 tent, 168 towel, 171 brick wall, 175 stone wall,
176 tile wall, 177 wood wall, 178 water, 180 window blind, 181 window, 184 tree, 185 fence, 186 ceiling, 187 sky,
188 cabinet, 189 table, 190 floor, 191 pavement, 192 mountain, 193 grass, 194 dirt, 195 paper, 196 food,
197 building, 198 rock, 199 wall, 200 rug"""
COCO_NAMES = {int(entry.split()[0]): entry.split(maxsplit=1)[1] for entry in _COCO.replace("\n", " ").split(", ")}

# Replacements for misleading ImageNet names, by WordNet offset.
_IMAGENET = {
    1514668: "rooster",
    1608432: "kite bird",
    1580077: "jay bird",
    1665541: "leatherback turtle",
    1847000: "drake duck",
    2012849: "crane bird",
    2105855: "Shetland sheepdog",
    2108089: "boxer dog",
    2112137: "chow dog",
    2113023: "Pembroke Welsh corgi",
    2113186: "Cardigan Welsh corgi",
    2123045: "tabby cat",
    2134084: "polar bear",
    2231487: "stick insect",
    2276258: "admiral butterfly",
    2277742: "ringlet butterfly",
    2279972: "monarch butterfly",
    2328150: "Angora rabbit",
    2389026: "sorrel horse",
    2395406: "pig",
    2412080: "ram sheep",
    2509815: "red panda",
    2747177: "trash can",
    2769748: "backpack",
    2814533: "station wagon",
    2879718: "archery bow",
    2892201: "brass plaque",
    2930766: "taxi cab",
    3014705: "treasure chest",
    3126707: "construction crane",
    3594734: "jeans",
    3673027: "ocean liner",
    3710721: "swimsuit",
    3793489: "computer mouse",
    3854065: "pipe organ",
    3929660: "guitar pick",
    3954731: "carpenter's plane",
    3991062: "flower pot",
    4037443: "race car",
    4118776: "ruler",
    4141975: "weighing scale",
    4243546: "slot machine",
    4515003: "upright piano",
    10148035: "bridegroom",
    12768682: "buckeye nut",
    12620546: "rose hip",
    13133613: "ear of corn",
    6359193: "website",
}

_CALTECH = {
    "airplanes": "airplane",
    "Motorbikes": "motorcycle",
    "Faces": "face",
    "Faces easy": "face",
    "Leopards": "leopard",
    "bass": "bass fish",
    "buddha": "Buddha statue",
    "car side": "car",
    "cellphone": "cell phone",
    "cougar body": "cougar",
    "cougar face": "cougar",
    "crocodile head": "crocodile",
    "flamingo head": "flamingo",
    "garfield": "Garfield the cartoon cat",
    "headphone": "headphones",
    "binocular": "binoculars",
    "inline skate": "roller skate",
    "joshua tree": "Joshua tree",
    "lotus": "lotus flower",
    "panda": "giant panda",
    "rhino": "rhinoceros",
    "sea horse": "seahorse",
    "snoopy": "Snoopy the cartoon dog",
    "water lilly": "water lily",
    "wild cat": "wildcat",
    "yin yang": "yin yang symbol",
    "windsor chair": "Windsor chair",
    "ant": "ant",
}


def imagenet_offset(source: str) -> int:
    """WordNet offset of an ImageNet photograph, from `imagenet-sample-images/n01440764_tench`."""
    return int(source.rsplit("/", 1)[-1].split("_")[0].removeprefix("n"))


def english_name(row: dict) -> str:
    """The natural name of a row of the named photographs."""
    if row["source"].startswith("caltech"):
        return _CALTECH.get(row["name"], row["name"])
    return _IMAGENET.get(imagenet_offset(row["source"]), row["name"])


# Basic-level categories (Rosch et al., 1976) and a few more general ones; WordNet provides their members.
GENERAL = """animal, bird, fish, snake, lizard, turtle, frog, spider, insect, butterfly, beetle, crab, monkey, ape, bear,
dog, cat, wolf, fox, whale, seal, sheep, goat, cattle, horse, elephant, rabbit, antelope, squirrel, shark, duck, parrot,
owl, eagle, penguin, crocodile, vehicle, car, truck, bus, train, locomotive, boat, ship, airplane, aircraft, bicycle,
motorcycle, building, house, shop, tower, bridge, fence, wall, roof, door, chair, seat, table, desk, sofa, bed, cabinet,
furniture, lamp, clock, watch, telephone, computer, keyboard, screen, camera, bottle, cup, glass, bowl, pot, pan, knife,
spoon, tool, weapon, gun, ball, musical instrument, guitar, piano, drum, hat, shoe, footwear, sweater, coat, dress,
skirt, clothing, swimsuit, glove, bag, box, basket, fruit, vegetable, bread, food, mushroom, fungus, flower, tree,
plant, mountain, shore, sign, book, toy, curtain, rug, mask, helmet, machine, kitchen appliance, person, container,
stick, boot, trousers, kitchen utensil, cart, spaceship, armor, structure, squash, crustacean, arachnid"""
GENERAL_NAMES = GENERAL.replace("\n", " ").split(", ")
