// detect MODEL IMAGE [SCORE]: prints what the model finds, best first: score, class, box in pixels
// and, of a model that finds masks, the mask as COCO's run lengths in the image's size.
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "detector.hpp"
#include "masks.hpp"

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: %s MODEL IMAGE.ppm|IMAGE.bmp [SCORE]\n", argv[0]);
    return 2;
  }
  try {
    const double threshold = argc == 4 ? std::atof(argv[3]) : 0.3;
    Detector detector(argv[1]);
    const Input input = preprocess(read_image(argv[2]));
    const Detections found = detector(input);
    for (std::size_t k = 0; k < found.scores.size() && found.scores[k] >= threshold; ++k) {
      const float* box = found.boxes.data() + 4 * k;
      std::printf("%.4f %s %.2f %.2f %.2f %.2f", found.scores[k],
                  model_info::kClasses.at(found.labels[k]), box[0], box[1], box[2], box[3]);
      if (model_info::kMasks) {
        const std::size_t cells = std::size_t{1} * model_info::kMaskHeight * model_info::kMaskWidth;
        const Mask mask = enlarged(found.masks.data() + k * cells, box, input);
        std::printf(" %s", run_lengths(mask).c_str());
      }
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
