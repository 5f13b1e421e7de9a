"""Questions in the form of LLM-Adapters' ARC-Easy."""

QUESTIONS = [
    ("Which of these melts in the sun?", ("a stone", "an ice cube", "a glass bottle", "a wooden chair"), 1),
    ("What do plants take in through their roots?", ("water", "light", "music", "wool"), 0),
    ("Which animal lays eggs?", ("a cow", "a dog", "a cat", "a hen"), 3),
    ("What pulls a dropped ball to the ground?", ("heat", "gravity", "sound"), 1),
    ("Which is the largest?", ("a grain of sand", "a mountain", "a house", "a tree", "a leaf"), 1),
]


def instruction(question, options, gold):
    listed = " ".join(f"Answer{n}: {option}" for n, option in enumerate(options, start=1))
    form = "/".join(f"answer{n}" for n in range(1, len(options) + 1))
    text = f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {form}"
    return {
        "instruction": text,
        "input": "",
        "output": f"the correct answer is answer{gold + 1}",
        "answer": f"answer{gold + 1}",
    }
