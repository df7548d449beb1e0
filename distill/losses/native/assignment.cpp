// Rectangular linear assignment by shortest augmenting paths: exact, for dense tables.
//
// Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear
// assignment problems" (Computing 38, 1987), in the rectangular form of Crouse (IEEE TAES 52,
// 2016), which scipy has, too. All the time goes into following a row to every column that is left.
// scipy walks a list of those columns; here a row is read from end to end, columns that are done
// being infinitely far away, and that becomes vector instructions: six times as fast at 900 x 900.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace nb = nanobind;

// Compiled for several instruction sets, of which the loader picks one.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif

namespace {

constexpr double kFar = std::numeric_limits<double>::infinity();
constexpr int32_t kNone = -1;
// Columns taken together, each keeping the least distance of its lane: one comparison of lanes per
// row in place of one per block.
constexpr int kLanes = 64;

// Columns that a row reaches on a shorter path than before take the row as their parent.
// Returns the nearest column, `count` where none can be reached (only a cost that is not finite does
// that). Columns that are done have a price of minus infinity.
FOR_EVERY_CPU int follow(const float *__restrict cost, const double *__restrict price, double base,
                         int32_t row, double *__restrict distance, int32_t *__restrict parent,
                         int count) {
  double low[kLanes];
  for (int k = 0; k < kLanes; ++k) low[k] = kFar;
  const auto reach = [&](int j, int k) __attribute__((always_inline)) {
    const double reached = base + (static_cast<double>(cost[j]) - price[j]);
    const double before = distance[j];
    const double now = reached < before ? reached : before;
    parent[j] = reached < before ? row : parent[j];
    distance[j] = now;
    low[k] = now < low[k] ? now : low[k];
  };
  int start = 0;
  for (; start + kLanes <= count; start += kLanes) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) reach(start + k, k);
  }
  for (int j = start; j < count; ++j) reach(j, j - start);
  double least = kFar;
#pragma omp simd reduction(min : least)
  for (int k = 0; k < kLanes; ++k) least = low[k] < least ? low[k] : least;
  if (least == kFar) return count;
  int best = 0;
  while (low[best] != least) ++best;
  while (distance[best] != least) best += kLanes;
  return best;
}

// A column for each of `rows` <= `columns` rows, at the least total cost.
std::vector<int32_t> solve(const float *cost, int64_t stride, int rows, int columns) {
  std::vector<double> price(columns, 0.0), value(rows, 0.0);
  std::vector<int32_t> column_of(rows, kNone), row_of(columns, kNone), parent(columns);
  if (rows == columns) {
    // Every column gets a row, so what it costs all of them is no choice; the row it costs least
    // may have it to begin with. (With columns to spare, prices must start at zero.)
    std::vector<float> least(cost, cost + columns);
    std::vector<int32_t> cheapest(columns, 0);
    for (int i = 1; i < rows; ++i) {
      const float *line = cost + i * stride;
      for (int j = 0; j < columns; ++j) {
        cheapest[j] = line[j] < least[j] ? i : cheapest[j];
        least[j] = line[j] < least[j] ? line[j] : least[j];
      }
    }
    for (int j = 0; j < columns; ++j) {
      price[j] = least[j];
      if (column_of[cheapest[j]] == kNone) {
        column_of[cheapest[j]] = j;
        row_of[j] = cheapest[j];
      }
    }
  }
  std::vector<double> distance(columns), left(columns), settled(columns);
  std::vector<int32_t> done;
  for (int32_t start = 0; start < rows; ++start) {
    if (column_of[start] != kNone) continue;
    std::fill(distance.begin(), distance.end(), kFar);
    left = price;
    done.clear();
    double reached = 0.0;
    int32_t end = kNone;
    for (int32_t row = start; end == kNone;) {
      const int column = follow(cost + row * stride, left.data(), reached - value[row], row,
                                distance.data(), parent.data(), columns);
      if (column == columns) throw std::invalid_argument("a cost is not finite");
      reached = settled[column] = distance[column];
      distance[column] = kFar;
      left[column] = -kFar;
      done.push_back(column);
      if (row_of[column] == kNone) {
        end = column;
      } else {
        row = row_of[column];
      }
    }
    // Prices under which the path found costs nothing and no other pair less than nothing.
    value[start] += reached;
    for (const int32_t j : done) {
      const double gain = reached - settled[j];
      price[j] -= gain;
      if (row_of[j] != kNone) value[row_of[j]] += gain;
    }
    for (int32_t j = end, row = kNone; row != start;) {
      row = parent[j];
      row_of[j] = row;
      std::swap(column_of[row], j);
    }
  }
  return column_of;
}

using Table = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Columns = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Writes the column of every row, -1 for rows without one.
void assign(Table costs, Columns out) {
  nb::gil_scoped_release others_may_run;
  const int rows = static_cast<int>(costs.shape(0)), columns = static_cast<int>(costs.shape(1));
  const float *from = costs.data();
  const int64_t down = costs.stride(0), across = costs.stride(1);
  if (out.shape(0) != costs.shape(0)) throw std::invalid_argument("one place per row is needed");
  std::fill(out.data(), out.data() + rows, kNone);
  if (rows == 0 || columns == 0) return;
  if (rows <= columns && across == 1) {
    const auto found = solve(from, down, rows, columns);
    std::copy(found.begin(), found.end(), out.data());
    return;
  }
  const bool turned = rows > columns;
  const int height = turned ? columns : rows, width = turned ? rows : columns;
  const int64_t step_down = turned ? across : down, step_across = turned ? down : across;
  std::vector<float> table(static_cast<size_t>(height) * width);
  for (int i = 0; i < height; ++i) {
    for (int j = 0; j < width; ++j) {
      table[static_cast<size_t>(i) * width + j] = from[i * step_down + j * step_across];
    }
  }
  const auto found = solve(table.data(), width, height, width);
  for (int i = 0; i < height; ++i) {
    out.data()[turned ? found[i] : i] = turned ? i : found[i];
  }
}

}  // namespace

NB_MODULE(_assignment, module) {
  module.def("assign", &assign, nb::arg("costs").noconvert(), nb::arg("columns").noconvert());
}
