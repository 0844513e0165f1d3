#include "attention/tile_kernel.h"

namespace fastgpt::attention {

void attend_tile_avx512(const Tile& tile, float* scratch) { attend_tile(tile, scratch); }

}  // namespace fastgpt::attention
