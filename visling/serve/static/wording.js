/* How each kind of task is asked for, and what models are called. */

const SEE = "and follow its attention between words and boxes.";

export const FORMS = {
  vqa: { label: "Question", verb: "Ask", hint: "", start: `Choose a picture, ask, ${SEE}` },
  statement: {
    label: "Sentence",
    verb: "Judge",
    hint: "The model says whether it is true of the picture.",
    start: `Choose a picture, write a sentence about it, ${SEE}`,
  },
  pair: {
    label: "Sentence",
    verb: "Judge",
    hint: "The model says whether it is true of the two pictures.",
    start: `Choose two pictures, write a sentence about them, ${SEE}`,
  },
  referring: {
    label: "Expression",
    verb: "Find it",
    hint: "Describe one thing; the model draws a box around it.",
    start: `Choose a picture, describe one thing in it, ${SEE}`,
  },
  grounding: {
    label: "Sentence",
    verb: "Find them",
    hint: "Put phrases into brackets: [a red star] above [a ring]. Each gets a box.",
    start: `Choose a picture, put phrases into brackets, ${SEE}`,
  },
  choices: {
    label: "Question",
    verb: "Choose",
    hint: "The model ranks the choices below.",
    start: `Choose a picture, ask, give choices, ${SEE}`,
  },
  retrieval: {
    label: "Caption",
    verb: "Search",
    hint: "Pictures at hand are ranked by how well it fits them.",
    start: "Write a caption: the pictures at hand are ranked by how well it fits them.",
  },
  classification: {
    label: "Text",
    verb: "Classify",
    hint: "The model labels the picture together with the text.",
    start: `Choose a picture, write a text, ${SEE}`,
  },
};

const FAMILIES = {
  visualbert: "VisualBERT",
  lxmert: "LXMERT",
  vilbert: "ViLBERT",
  vlbert: "VL-BERT",
  cvlp: "CVLP",
};

/** A family as its paper writes it. */
export const familyName = (family) => FAMILIES[family] ?? family;

/** A run as readers tell it from the others: by its family and task, or by its name where several have both. */
export function modelName(model, models) {
  const alike = models.filter((other) => other.family === model.family && other.task === model.task);
  return alike.length > 1 ? model.run : `${familyName(model.family)} · ${model.task}`;
}

/** Whether another run can be asked the same question: also one that reads the words alone, beside one that sees. */
export const isComparable = (one, other) =>
  one.run !== other.run &&
  (one.images === other.images || other.images === 0) &&
  one.choices === other.choices &&
  ["retrieval", "grounding"].every((form) => (one.form === form) === (other.form === form));
