// detect MODEL IMAGE [SCORE]: prints what the model finds, best first.
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "detector.hpp"

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: %s MODEL IMAGE.ppm|IMAGE.bmp [SCORE]\n", argv[0]);
    return 2;
  }
  try {
    const double threshold = argc == 4 ? std::atof(argv[3]) : 0.3;
    Detector detector(argv[1]);
    const Detections found = detector(preprocess(read_image(argv[2])));
    for (std::size_t k = 0; k < found.scores.size() && found.scores[k] >= threshold; ++k) {
      const float* box = found.boxes.data() + 4 * k;
      std::printf("%.4f %s %.2f %.2f %.2f %.2f\n", found.scores[k],
                  model_info::kClasses.at(found.labels[k]), box[0], box[1], box[2], box[3]);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
